"""Cut the package's calibration and held-out texts from stories sampled with seeds that training did not use.

No story is in both texts. That none is in the training sample follows from its probability under the teacher: a
story of log2-probability -b is expected 2^-b times the number of training stories; those with b < 64 are left out.

    python scripts/embedded/make_texts.py --teacher TEACHER --calibration a.txt --heldout b.txt --out teal_jax/embedded
"""

import argparse
import math
from pathlib import Path

from evaluate import load_model, negative_log_likelihood

SEPARATOR = "<|endoftext|>"
LEAST_BITS = 64


def choose(shards, size, teacher, taken):
    """Stories in the order of the shards, about `size` bytes in all, none in `taken`; and the fewest bits of any."""
    stories, total, fewest = [], 0, math.inf
    for path in shards:
        for story in path.read_text(encoding="utf-8").split(SEPARATOR):
            story = story.strip("\n ")
            if total >= size or not story or story in taken or len(story) < 200:
                continue
            bits = negative_log_likelihood(teacher, [story], batch=1)[0] / math.log(2)
            if bits < LEAST_BITS:
                continue
            fewest = min(fewest, bits)
            taken.add(story)
            stories.append(story)
            total += len(story.encode()) + len(SEPARATOR) + 2
    return stories, fewest


def main():
    """Write calibration.txt and heldout.txt, stories separated by lines of `<|endoftext|>`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--calibration", nargs="+", type=Path, required=True, help="text shards")
    parser.add_argument("--heldout", nargs="+", type=Path, required=True, help="text shards of another seed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration-bytes", type=int, default=200_000)
    parser.add_argument("--heldout-bytes", type=int, default=100_000)
    args = parser.parse_args()
    teacher, taken = load_model(args.teacher), set()
    for name in ("calibration", "heldout"):
        shards = sorted(getattr(args, name))
        stories, fewest = choose(shards, getattr(args, f"{name}_bytes"), teacher, taken)
        text = f"\n{SEPARATOR}\n".join(stories) + "\n"
        (args.out / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(stories)} stories, {len(text.encode())} bytes, fewest bits {fewest:.0f}")


if __name__ == "__main__":
    main()
