"""A result as `run.py --json` prints it, and the memory that the run took."""
import os
import re
import sys
from pathlib import Path

from minipali.outputs.masks import run_lengths


def peak_rss_bytes(status_file="/proc/self/status"):
    """The most memory that this process has held, or None where the system does not say: it only informs."""
    try:
        # VmHWM is the peak, VmRSS what is held at this moment.
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path(status_file).read_text(encoding="utf-8"))[1])
    except (OSError, ValueError, TypeError):
        pass  # not on Linux, where what follows would also count the process that started us, however large it was
    try:
        import resource  # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except (ImportError, AttributeError, OSError, ValueError):
        return None


def tokens_per_second(answer):
    """The speed of decoding. The first token comes with the prefill, so it is that of the others."""
    steps = max(len(answer.ids) - (answer.stopped_by == "length"), 0)
    return steps / answer.decode_seconds if steps else 0.0


def in_one_line(text: str) -> str:
    """As a column of a line: without tabs and line breaks, and with a file name's bytes that are no UTF-8 escaped."""
    return " ".join(text.replace("\t", " ").splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")


def _box(detection, mask):
    """One of the `boxes`; its mask covers the whole picture, row by row, and the first run is outside the shape."""
    box = {"label": detection.label, "box": list(detection.box)}
    if mask is not None:
        box["mask"] = {"width": mask.shape[1], "height": mask.shape[0], "counts": run_lengths(mask)}
    return box


def _answer(text, answer):
    """One of several answers: its text, and the logarithm of its probability, whole and token by token."""
    return {"text": text, "ids": answer.ids, "stopped_by": answer.stopped_by, "logprob": answer.logprob,
            "logprobs": answer.logprobs, "stop_logprob": answer.stop_logprob}


def seconds(result):
    """How long each part took."""
    return {"load": result.load_seconds, "vision": result.vision_seconds, "prefill": result.answer.prefill_seconds,
            "decode": result.answer.decode_seconds}


def to_json(request, result):
    """What `--json` prints about a Result, as a dict."""
    answer, several = result.answer, [_answer(*one) for one in result.several]
    question = {"model": os.fspath(request.model), "image": result.image, "prompt": result.prompt,
                "prompt_ids": result.prompt_ids}
    if request.scored:
        return {**question, "scores": several, "seconds": seconds(result), "peak_rss_bytes": peak_rss_bytes()}
    report = {**question, "output_ids": answer.ids, "text": result.text,
              "boxes": list(map(_box, result.detections, result.masks)), "seconds": seconds(result),
              "tokens_per_second": tokens_per_second(answer), "peak_rss_bytes": peak_rss_bytes(),
              "stopped_by": answer.stopped_by, "logprobs": answer.logprobs, "stop_logprob": answer.stop_logprob}
    if several:
        report["beams" if request.beams > 1 else "samples"] = several
    return report
