"""`python -m addenda …`, and so `accelerate launch -m addenda tune …`."""

from addenda.cli.main import run

if __name__ == "__main__":
    run()
