"""Seeded bugs: each is one replacement in one file, and at least one test must fail because of it.

Most are mistakes that real ports of these models have made. A bug that the suite lets through shows a missing test.
They stand in bugs/, a file for each room of the package.
"""
import importlib
from pathlib import Path
from typing import NamedTuple


class Bug(NamedTuple):
    """`file`: below minipali/, or run.py; `old` stands in it exactly once; FAST bugs are tried in every CI run."""
    file: str
    what: str
    old: str
    new: str
    fast: bool = False


FAST = True
TESTS_FOLDER = Path(__file__).resolve().parents[1]

# Where the tests of a file are not (only) in its mirror, tests/ROOM/test_NAME.py; the quickest to notice come first.
TESTS = {
    "model/": "test_golden.py model/test_paligemma.py model/test_ops.py model/test_shape_lines.py",
    "model/ops.py": "test_golden.py model/test_ops.py model/test_shape_lines.py",
    "model/losses.py": "test_golden.py model/test_losses.py model/test_shape_lines.py",
    "model/vq_vae.py": "model/test_vq_vae.py",
    "learning/": "learning/test_loop.py learning/test_fine_tune.py",
    "learning/optimizer.py": "learning/test_optimizer.py learning/test_loop.py",
    "learning/backward/": "test_golden.py learning/backward/test_backward.py model/test_shape_lines.py "
                          "learning/test_lora.py",
    "learning/backward/vq_vae.py": "model/test_vq_vae.py",
    "learning/examples.py": "learning/test_fine_tune.py",
    "learning/fine_tune.py": "learning/test_fine_tune.py",
    "learning/lora.py": "learning/test_lora.py learning/test_fine_tune.py",
    "checkpoint/config.py": "checkpoint/test_config.py checkpoint/test_gemma_config.py learning/test_fine_tune.py",
    "checkpoint/": "checkpoint/test_hub.py checkpoint/test_checkpoint.py decoding/test_text_models.py",
    "checkpoint/tensors.py": "checkpoint/test_tensors.py checkpoint/test_hub.py decoding/test_text_models.py",
    "checkpoint/gemma_config.py": "checkpoint/test_gemma_config.py checkpoint/test_config.py "
                                  "decoding/test_text_models.py",
    "checkpoint/__init__.py": "checkpoint/test_checkpoint.py learning/test_fine_tune.py",
    "checkpoint/matrices.py": "checkpoint/test_matrices.py",
    "checkpoint/read_matrices.py": "checkpoint/test_matrices.py",
    "checkpoint/choice.py": "checkpoint/test_matrices.py",
    "checkpoint/hub.py": "checkpoint/test_hub.py learning/test_fine_tune.py decoding/test_text_models.py",
    "checkpoint/fields.py": "checkpoint/test_config.py checkpoint/test_gemma_config.py decoding/test_text_models.py",
    "checkpoint/safetensors_file.py": "checkpoint/test_safetensors_file.py checkpoint/test_hub.py",
    "checkpoint/npz_file.py": "checkpoint/test_big_vision.py checkpoint/test_vae_oid.py",
    "inputs/": "inputs/test_unigram.py inputs/test_tokenizer.py inputs/test_sentencepiece.py "
               "inputs/test_normalizers.py",
    "inputs/normalizers.py": "inputs/test_normalizers.py inputs/test_unigram.py",
    "inputs/charsmap.py": "inputs/test_normalizers.py inputs/test_unigram.py",
    "inputs/sentencepiece.py": "inputs/test_sentencepiece.py inputs/test_unigram.py inputs/test_read_tokenizer.py",
    "inputs/image.py": "inputs/test_image.py learning/test_fine_tune.py",
    "inputs/folder.py": "decoding/test_batch.py learning/test_fine_tune.py",
    "decoding/batch.py": "decoding/test_batch.py test_golden.py",
    "decoding/generate.py": "decoding/test_generate.py decoding/test_search.py decoding/test_grammar.py",
    "decoding/loaded_model.py": "decoding/test_generate.py decoding/test_text_models.py",
    "decoding/sampling.py": "decoding/test_sampling.py decoding/test_search.py",
    "outputs/": "outputs/test_boxes.py",
    "outputs/picture_file.py": "test_run.py",
    "outputs/masks.py": "model/test_vq_vae.py decoding/test_batch.py",
    "small_world/": "small_world/test_world.py",
    "small_world/stages.py": "small_world/test_stages.py small_world/test_contrastive.py",
    "small_world/train_masks.py": "model/test_vq_vae.py",
    "looking/classic_bugs.py": "looking/test_lab.py",
    "looking/exercise_list.py": "looking/test_exercise.py",
    "looking/exercise_plugin.py": "looking/test_exercise.py",
    "looking/exercise_later.py": "looking/test_exercise.py",
    "commands/ask.py": "commands/test_ask.py test_run.py",
    "commands/report.py": "commands/test_report.py test_run.py",
    "commands/": "test_errors.py",
    "commands/bench_picture.py": "commands/test_bench.py",
    "commands/compare.py": "looking/test_compare.py",
    "commands/inspect.py": "commands/test_inspect.py checkpoint/test_matrices.py",
    "commands/lens.py": "looking/test_lens.py",
    "commands/train.py": "small_world/test_recipe.py learning/test_fine_tune.py",
    "commands/xray.py": "looking/test_xray.py",
    "__main__.py": "test_errors.py",
    "checkpoint/int8_file.py": "checkpoint/test_matrices.py",
    "looking/": "looking/test_lens.py",
    "looking/figures.py": "test_course.py",
    "looking/measured.py": "test_course.py",
    "looking/svg.py": "test_course.py",
    "looking/pages.py": "test_course.py test_readme.py",
    "commands/figures.py": "test_course.py",
    "looking/taps.py": "looking/test_compare.py",
    "looking/attribution.py": "looking/test_xray.py",
    "looking/panels.py": "looking/test_xray.py",
    "looking/sources.py": "looking/test_xray.py",
    "looking/page.py": "looking/test_xray.py",
    "trace.py": "test_trace.py model/test_paligemma.py",
    "backend.py": "test_backend.py",
    "run.py": "test_run.py",
}


def tests_of(bug):
    """The test files for a bug: the mirror of its file, then those of TESTS' longest matching path."""
    mirror = Path(bug.file).parent / f"test_{Path(bug.file).name}"
    path = max((path for path in TESTS if bug.file.startswith(path)), key=len, default=None)
    others = TESTS[path].split() if path else []
    first = [mirror.as_posix()] if (TESTS_FOLDER / mirror).exists() else []
    return list(dict.fromkeys(first + others))


def all_bugs():
    """The bugs of every room, in the order of the files' names."""
    rooms = sorted(path.stem for path in (Path(__file__).parent / "bugs").glob("*.py"))
    return [bug for room in rooms for bug in importlib.import_module(f"bugs.{room}").BUGS]
