"""Seeded bugs of minipali/small_world/."""
from seeded import FAST, Bug

BUGS = [
    Bug("small_world/patch_labels.py", "a patch goes to the first thing on it",
        "cover.argmax(0), cover.max(0)", "(cover > 0).argmax(0), cover.max(0)"),
    Bug("small_world/patch_labels.py", "nothing counts as much as a thing",
        "np.where(truth == 0, 1 / 3, 1.0)", "np.where(truth == 0, 1.0, 1.0)"),
    Bug("small_world/patch_labels.py", "every question's nothing counts less",
        "if question == 0 else np.ones_like(losses)", "if True else losses"),
    Bug("small_world/patch_labels.py", "what nobody knows is asked",
        "wanted[:, question] != UNKNOWN", "wanted[:, question] != -2", FAST),
    Bug("small_world/patch_labels.py", "codes of another thing",
        "list(itertools.islice(codes, len(scene.things)))", "list(itertools.islice(codes, len(scene.things)))[::-1]"),
    Bug("small_world/patch_labels.py", "letters upside down",
        "np.array(numbers)[ink.argmax(0)]", "np.array(numbers)[ink.argmax(0)[::-1]]"),
    Bug("small_world/tasks.py", "boxes cut instead of rounded",
        "tuple(round(value) for value in box)", "tuple(int(value) for value in box)"),
    Bug("small_world/tasks.py", "the answer is mostly yes", "if rng.random() < 0.5:", "if rng.random() < 0.75:"),
    Bug("small_world/tasks.py", "left is right",
        '("left of", "right of", "above", "below")', '("right of", "left of", "above", "below")'),
    Bug("small_world/tasks.py", "the side on which it does not lie",
        "for pair in _pairs(scene) if pair[3]]", "for pair in _pairs(scene) if not pair[3]]"),
    Bug("small_world/scores.py", "the mask of another thing", "max(scene.things, key=", "min(scene.things, key="),
    Bug("small_world/scores.py", "shared pixels over the thing's",
        "np.count_nonzero(mask | thing.mask)", "np.count_nonzero(thing.mask)"),
    Bug("small_world/world.py", "things hidden by others",
        "if any(np.count_nonzero(mask) < VISIBLE * area", "if any(False and VISIBLE * area"),
]
