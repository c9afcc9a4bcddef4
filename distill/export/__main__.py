from distill.export import main

main()
