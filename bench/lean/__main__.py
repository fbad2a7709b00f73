"""What a step keeps and costs, plain and lean: `python -m bench.lean`."""

from bench.lean.run import main

if __name__ == "__main__":
    main()
