"""A trainer publishes its weights after every step; another process always has the newest, without a copy.

    python examples/live_weights.py            # both, as two processes
    python examples/live_weights.py trainer    # or each in a terminal of its own
    python examples/live_weights.py inference

Needs numpy and maptensors.
"""

import subprocess
import sys

import maptensors as mt
import numpy as np

NAME = "example-live-weights"
STEPS = 20


def forward(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return np.tanh(x @ weights["fc1.weight"].T) @ weights["fc2.weight"].T


def trainer() -> None:
    """Gradient descent towards a fixed network, published as it goes."""
    rng = np.random.default_rng(0)
    goal = {"fc1.weight": rng.normal(size=(64, 8)), "fc2.weight": rng.normal(size=(1, 64)) / 8}
    weights = {"fc1.weight": goal["fc1.weight"].copy(), "fc2.weight": np.zeros((1, 64))}
    with mt.publish(NAME, {"weights": weights, "step": 0}) as publisher:
        for step in range(1, STEPS + 1):
            for _ in range(50):
                x = rng.normal(size=(32, 8))
                hidden = np.tanh(x @ weights["fc1.weight"].T)
                error = hidden @ weights["fc2.weight"].T - forward(goal, x)
                weights["fc2.weight"] -= 0.01 * error.T @ hidden / len(x)
            # fc1 is frozen: its pages are shared by all generations.
            publisher.publish({"weights": weights, "step": step}, changed=["weights.fc2.weight"])


def inference() -> None:
    """Answer one question again and again, with the newest weights there are."""
    question = np.ones((1, 8))
    with mt.attach(NAME, timeout=60) as weights:
        state = weights.state()
        print(f"step {state['step']:2}: {forward(state['weights'], question).item():+.4f}")
        while state["step"] < STEPS:
            if not weights.wait(timeout=60):
                raise SystemExit("the trainer has published nothing for a minute")
            changed = weights.refresh()
            state = weights.state()
            print(
                f"step {state['step']:2}: {forward(state['weights'], question).item():+.4f}",
                *sorted(changed or ()),
            )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["trainer"]:
            trainer()
        case ["inference"]:
            inference()
        case []:
            mt.Publisher(NAME).remove()  # of a run before
            other = subprocess.Popen([sys.executable, __file__, "inference"])
            trainer()
            code = other.wait(timeout=120)
            mt.Publisher(NAME).remove()
            sys.exit(code)
        case _:
            sys.exit(__doc__)
