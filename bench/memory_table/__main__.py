"""What a training step of each method needs: `python -m bench.memory_table`."""

from bench.memory_table.run import main

if __name__ == "__main__":
    main()
