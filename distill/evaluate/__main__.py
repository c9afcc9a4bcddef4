from distill.evaluate import main

main()
