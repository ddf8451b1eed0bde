"""Write a run's averaged weights as a model folder: `python -m bench.train_builtin.export RUN DIR`.

Can be used while the run goes on: a checkpoint is always whole.
"""

import argparse
from pathlib import Path

from bench.train_builtin import model, tokenizer, train


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder with checkpoint.pt")
    parser.add_argument("folder", type=Path, help="model folder to write")
    args = parser.parse_args()
    path: Path = args.run / "checkpoint.pt"
    if not path.exists():
        parser.error(f"{path} does not exist: train first, with --out {args.run}")
    shape = model.ModelShape(vocab_size=tokenizer.build().get_vocab_size())
    run = train.load_or_start(path, shape, seed=0)
    model.export(shape, run.average, args.folder)
    print(f"step {run.step}, {run.seconds / 60:.0f} minutes of training -> {args.folder}")


if __name__ == "__main__":
    main()
