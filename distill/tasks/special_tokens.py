"""Special tokens of trained tokenizers, by their names in transformers."""

# AutoTokenizer adds this token, beyond the vocabulary, to a Qwen 2 folder whose tokenizer lacks it.
END_OF_TEXT = "<|endoftext|>"

# A tokenizer with cls_token and sep_token wraps texts as [CLS] text [SEP].
CLASSIFICATION_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "eos_token": END_OF_TEXT,
}
LANGUAGE_TOKENS = {"pad_token": "<|padding|>", "eos_token": END_OF_TEXT}
