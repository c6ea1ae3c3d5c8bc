"""python -m recipes [NAME …] [--seeds … --steps …]: run recipes one after the other, by default all of them."""

import sys
from importlib import import_module

NAMES = ("svft", "loldu", "miss", "lora_pro", "dylora", "shira")


def main() -> None:
    named = [a for a in sys.argv[1:] if a in NAMES]
    rest = [a for a in sys.argv[1:] if a not in NAMES]
    if "-h" in rest or "--help" in rest:
        print(
            __doc__,
            "NAMEs:",
            *(f"  {n:9} {import_module(f'recipes.{n}').__doc__.partition(chr(10))[0]}" for n in NAMES),
            sep="\n",
        )
        return
    for name in named or NAMES:
        sys.argv = [f"recipes.{name}", *rest]
        import_module(f"recipes.{name}").main()


if __name__ == "__main__":
    main()
