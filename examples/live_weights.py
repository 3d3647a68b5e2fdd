"""A trainer publishes its weights after every step; another process always has the newest, without a copy.

    python examples/live_weights.py            # both, as two processes
    python examples/live_weights.py trainer    # or each in a terminal of its own
    python examples/live_weights.py inference

Needs numpy and maptensors.
"""

import subprocess
import sys
import time

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
    publisher = mt.publish(NAME, {"weights": weights, "step": 0})
    for step in range(1, STEPS + 1):
        for _ in range(50):
            x = rng.normal(size=(32, 8))
            hidden = np.tanh(x @ weights["fc1.weight"].T)
            error = hidden @ weights["fc2.weight"].T - forward(goal, x)
            weights["fc2.weight"] -= 0.01 * error.T @ hidden / len(x)
        # fc1 is frozen: its pages are shared by all generations.
        publisher.publish({"weights": weights, "step": step}, changed=["weights.fc2.weight"])
        time.sleep(0.1)  # as a step of a larger model takes
    publisher.remove()


def inference() -> None:
    """Answer one question again and again, with the newest weights there are."""
    question = np.ones((1, 8))
    with mt.attach(NAME, timeout=60) as weights:
        changed: frozenset[str] = frozenset()
        try:
            while True:
                state = weights.state()
                answer = forward(state["weights"], question).item()
                print(f"step {state['step']:2}: {answer:+.4f}", *sorted(changed), flush=True)
                weights.wait()
                changed = weights.refresh() or frozenset()
        except mt.errors.PublicationError:
            print("the trainer has ended")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["trainer"]:
            trainer()
        case ["inference"]:
            inference()
        case []:
            mt.Publisher(NAME).remove()  # of a run that was killed
            other = subprocess.Popen([sys.executable, __file__, "inference"])
            trainer()
            sys.exit(other.wait(timeout=120))
        case _:
            sys.exit(__doc__)
