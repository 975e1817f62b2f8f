"""Seeded bugs of run.py and of the small files beside the rooms."""
from seeded import FAST, Bug

BUGS = [
    Bug("trace.py", "scopes that are never left", "        del _path[-len(self.names):]", "        del _path[-1:]"),
    Bug("trace.py", "a recorder that stays",
        "    finally:\n"
        "        _recorder = outer",
        "    finally:\n"
        "        pass"),
    Bug("files.py", "one name for all runs", '.{os.urandom(6).hex()}.part"', '.part"', FAST),
    Bug("files.py", "renamed before the bytes are on the disk", "            os.fsync(file.fileno())\n", ""),
    Bug("files.py", "synced before the last bytes are out", "            file.flush()\n", ""),
    Bug("files.py", "files that only their owner can read", "os.open(name, flags, 0o666)", "os.open(name, flags, 0o600)"),
    Bug("files.py", "what was private is shown to all", "stat.S_IMODE(os.stat(target).st_mode)", "0o644"),
    Bug("files.py", "a link is replaced by a file", "target = Path(os.path.realpath(path))", "target = Path(path)"),
    Bug("files.py", "the temporary file lies elsewhere",
        "target.with_name(f", "Path(os.getcwd(), f"),
    Bug("files.py", "the temporary name is longer than folders allow", "target.name[:40]", "target.name"),
    Bug("files.py", "what failed stays behind", "            os.unlink(temporary)\n", "            pass\n", FAST),
    Bug("files.py", "a file in the place of a device", "not os.path.isfile(path):", "os.path.isdir(path):"),
    Bug("files.py", "a folder that is not there is noticed after the work",
        "if not os.path.isdir(folder) or not os.access(folder, os.W_OK):", "if False:"),
    Bug("files.py", "JSON of the wrong bytes ends in a traceback", "(ValueError, RecursionError)", "RecursionError"),
    Bug("run.py", "nothing said of unreadable pictures at the end", "return 2 if unusable else 0", "return 0"),
    Bug("run.py", "the first of --ask is asked twice", "args.ask.pop(0)", "args.ask[0]"),
    Bug("run.py", "--with left out", "in_one_prompt(features[:1], features[1:])", "features[:1]"),
    Bug("run.py", "the tokens of --with not counted",
        "check_ids(ids, model.cfg, 0 if args.no_image else 1 + len(args.others))", "check_ids(ids, model.cfg)"),
    Bug("run.py", "answers that break their line", "words = in_one_line(text) if", "words = text if"),
    Bug("run.py", "progress that stays", "        if self.width:\n", "        if False:\n"),
    Bug("run.py", "masks of the first question only",
        "                shown[1].extend(masks)\n", "                shown[1].extend([] if shown[1] else masks)\n"),
    Bug("run.py", "masks that are not drawn", "draw(images[0], detections, masks)", "draw(images[0], detections)"),
    Bug("run.py", "height and width of masks exchanged",
        '{"width": mask.shape[1], "height": mask.shape[0]', '{"width": mask.shape[0], "height": mask.shape[1]'),
    Bug("run.py", "an original overwritten by its boxes", '.name}.boxes.png"', '.name}"'),
]
