"""What `dtrain init` writes: a job, a task of the user's own, and where it needs one a file that opens its data.

The tasks beside this file are for users to read and change. dtrain itself never imports them.
"""

from pathlib import Path

from dtrain.errors import InputError

FOR_CHECKERS = "  # type: ignore[import-untyped]"
_LEARNS = {
    "mlp": "to tell handwritten digits apart, with a multilayer perceptron",
    "cnn": "to tell handwritten digits apart, with a convolutional network",
    "rnn": "to write like the Python standard library, a byte at a time, with an LSTM",
    "transformer": "to write like the Python standard library, a byte at a time, with a transformer",
    "autoencoder": "to draw digits, with a variational autoencoder",
    "gan": "to draw digits, with a generator and a discriminator",
}
MODELS = tuple(_LEARNS)
"""Families of tasks to begin from."""

_OPTIONS = {
    "mlp": "width: 128",
    "cnn": "width: 32",
    "rnn": "width: 128",
    "transformer": "width: 64, num_layers: 2",
    "autoencoder": "latent: 8",
    "gan": "latent: 16",
}
_RATE = {"gan": "1e-3, betas: [0.0, 0.9], weight_decay: 0", "autoencoder": "2e-3, weight_decay: 0"}
_STEPS = {"rnn": 400, "transformer": 400, "autoencoder": 1500, "gan": 2000}

_DIGITS = """\
  open: ./data.py:open_data            # a function of yours; `data: ./data.py:open_data` is short for a name and this
  shape: {kind: images, channels: 1, height: 8, width: 8, num_classes: 10}   # given to build() as `data`"""
_TEXT = """\
  source: python-stdlib                # or your own: a file, a folder, a glob such as ~/books/*.txt
  tokenizer: {name: bytes}
  sequence_length: 64
  held_out_limit: 65536
  held_out_context: 0"""

_JOB = """\
# Learns {learns}. Less than a minute on two CPU cores.
#
#     dtrain plan {job}           what would run
#     dtrain submit {job}         train, and follow
#     dtrain submit {job} --set train.steps=50 --set model.options.width=64
#
# Every key is explained in docs/options.md, and by `dtrain schema` to editors.

name: {name}
description: Learns {learns}

model:
  name: custom                         # your own code; `dtrain schema` lists the models that come with dtrain
  build: ./task.py:build               # a function in a file beside this one
  options: {{{options}}}

data:
  name: {data}
{about_data}

batch: {{global: 64}}                    # over all workers together
optimizer: {{name: adamw, lr: {rate}}}
schedule: {{name: cosine, warmup_steps: 20}}
train: {{steps: {steps}, seed: 0, log_every_steps: 20}}
evaluate: {{every_steps: 100, samples: 128}}
checkpoint: {{every_steps: 100}}         # on storage; a lost worker comes back from memory
"""


def files(model: str, folder: Path) -> dict[Path, str]:
    """What would be written where. Raises `InputError` when something stands there already."""
    is_text = model in ("rnn", "transformer")
    job = _JOB.format(
        learns=_LEARNS[model],
        job=folder / "job.yaml",
        name=f"my_{model}",
        options=_OPTIONS[model],
        data="text" if is_text else "custom",
        about_data=_TEXT if is_text else _DIGITS,
        rate=_RATE.get(model, "3e-3"),
        steps=_STEPS.get(model, 300),
    )
    found = {"job.yaml": job, "task.py": _text(model), **({} if is_text else {"data.py": _text("digits")})}
    taken = [name for name in found if (folder / name).exists()]
    if taken:
        raise InputError(
            f"{folder / taken[0]} is there already, and nothing is overwritten; name another folder: dtrain init FOLDER"
        )
    return {folder / name: text for name, text in found.items()}


def write(made: dict[Path, str]) -> None:
    """Write new files. Raises `InputError` where that cannot be."""
    for path, text in made.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; name another folder") from None


def _text(name: str) -> str:
    return (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8").replace(FOR_CHECKERS, "")
