"""The pictures and tasks that the shipped model learned from, and its training.

A seed becomes a scene (`world.py`: shapes and letters; `drawings.py`: emoji drawings, which `artwork.py` fetches), a
scene becomes pairs of prompt and answer (`tasks.py`, `drawing_tasks.py`, and `relations.py` for both), and these become
batches with a loss and a gradient (`stages.py`). Read them in this order, then `recipe.py`, which says how much of each
the model saw.
Beside them: `easy_vqa.py`, `vocabulary.py`, `train_masks.py` (the mask codec), `patch_labels.py` (a loss of stage 1),
`transplant.py` (an old language model under a new tower), and what the model is measured with: `scores.py`,
`drawing_scores.py`, `progress.py`.
"""
