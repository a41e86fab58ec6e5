"""`python -m sparselet.cli`, as `torchrun -m` and `accelerate launch -m` start it."""

from sparselet.cli.main import run

if __name__ == "__main__":
    run()
