"""What the tests of stock mlx-vlm show to its commands, and what they ask in child processes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.end_to_end.environments import Environment

# With the template's text several times the demo's block budget of 32 tokens.
QUESTION = "What is this?"
MAX_TOKENS = 12
VIDEO_FPS = 2

# What ``mlx_vlm.generate`` does, by mlx-vlm's Python interface.
GENERATE = """
import json, sys
from mlx_vlm import generate, load
from mlx_vlm.prompt_utils import apply_chat_template
model, processor = load(sys.argv[1])
question, max_tokens, each_media = json.loads(sys.argv[2])
answers = []
for media in each_media:
    video = {name: media[name] for name in ("video", "fps") if name in media}
    images = len(media.get("image", []))
    prompt = apply_chat_template(processor, model.config, question, num_images=images, **video)
    made = generate(model, processor, prompt, max_tokens=max_tokens, temperature=0, verbose=False, **media)
    answers.append({"text": made.text, "prompt_tokens": made.prompt_tokens})
print(json.dumps(answers))
"""

# The prompt stays within the block budget: above it mlx-vlm's own class attends to other blocks.
VLM_LOGITS = """
import sys
import mlx.core as mx
import numpy as np
from mlx_vlm import load
from mlx_vlm.utils import load_image
checkpoint, picture, question, file = sys.argv[1:]
model, processor = load(checkpoint)
inputs = processor(text=["]<]image[>[" + question], images=[load_image(picture)], return_tensors="mlx")
tokens = inputs["input_ids"]
seen = model(tokens, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"]).logits
read = model(tokens).logits
assert 16 < tokens.size <= 32, tokens.size
np.savez(file, seen=np.array(seen.astype(mx.float32)), read=np.array(read.astype(mx.float32)))
np.save(file + ".tokens.npy", np.array(tokens))
print(type(model).__module__)
"""

LM_LOGITS = """
import sys
import mlx.core as mx
import numpy as np
from mlx_lm import load
checkpoint, tokens, file = sys.argv[1:]
model, *_ = load(checkpoint)
np.savez(file, read=np.array(model(mx.array(np.load(tokens))).astype(mx.float32)))
print(type(model).__module__)
"""


@dataclass(frozen=True)
class Media:
    """Files to show: two pictures of different sizes, and three seconds of video.

    Attributes:
        lookalike, other_video: of the same size as the first one, with something else to see.
    """

    picture: Path
    other_picture: Path
    lookalike: Path
    video: Path
    other_video: Path

    # A picture's tokens: one for 28 x 28 pixels, and a marker at each end.
    PICTURE_TOKENS = 4 * 3 + 2
    OTHER_PICTURE_TOKENS = 2 * 3 + 2

    def options(self) -> dict[str, list[str]]:
        """``mlx_vlm.generate``'s options, by what they show."""
        pictures = [str(self.picture), str(self.other_picture)]
        return {
            "nothing": [],
            "one picture": ["--image", pictures[0]],
            "two pictures": ["--image", *pictures],
            "a video": ["--video", str(self.video), "--fps", str(VIDEO_FPS)],
        }

    def keywords(self) -> dict[str, dict[str, Any]]:
        """The same and more for its Python interface."""
        pictures = [str(self.picture), str(self.other_picture)]
        return {
            "nothing": {},
            "one picture": {"image": pictures[:1]},
            "two pictures": {"image": pictures},
            "a video": {"video": [str(self.video)], "fps": VIDEO_FPS},
            "a lookalike": {"image": [str(self.lookalike)]},
            "another video": {"video": [str(self.other_video)], "fps": VIDEO_FPS},
        }


def make_media(directory: Path, picture: Path) -> Media:
    """``picture`` is the demo's; opencv is there where mlx-vlm is."""
    import cv2

    shapes = {"other.png": (84, 56), "lookalike.png": (84, 112)}
    for name, shape in shapes.items():
        pixels = np.zeros((*shape, 3), np.uint8)
        pixels[20:60, 10:30] = (40, 200, 90)
        cv2.imwrite(str(directory / name), pixels)
    for name, step in (("video.mp4", 5), ("other.mp4", -5)):
        write_video(directory / name, step)
    pictures = (directory / name for name in shapes)
    return Media(picture, *pictures, directory / "video.mp4", directory / "other.mp4")


def write_video(path: Path, step: int) -> None:
    """A red square that moves to the right or to the left over a background that changes."""
    import cv2

    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 4.0, (112, 84))
    for number in range(12):
        frame = np.full((84, 112, 3), 4 * abs(step) * number, np.uint8)
        left = 46 + step * (number - 6)
        frame[10:40, left : left + 20] = (0, 0, 255)
        video.write(frame)
    video.release()


def generate(environment: Environment, model: Path, *options: str, module: bool = False, **run: Any) -> str:
    """The text that ``mlx_vlm.generate``, or ``python -m mlx_vlm.generate``, prints greedily."""
    command = ["-m", "mlx_vlm.generate"] if module else [environment.script("mlx_vlm.generate")]
    fixed = ("--prompt", QUESTION, "--max-tokens", str(MAX_TOKENS), "--temperature", "0", "--no-verbose")
    return environment.run(*command, "--model", model, *fixed, *options, **run).stdout.removesuffix("\n")


def generate_in_python(
    environment: Environment, model: Path, media: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Text and number of prompt tokens, by what is shown; all in one process."""
    asked = json.dumps([QUESTION, MAX_TOKENS, list(media.values())])
    output = environment.run("-c", GENERATE, model, asked).stdout
    return dict(zip(media, json.loads(output.splitlines()[-1]), strict=True))


def convert(environment: Environment, source: Path, directory: Path, *options: str) -> Path:
    environment.run_script("mlx_vlm.convert", "--hf-path", source, "--mlx-path", directory, *options)
    return directory


@dataclass(frozen=True)
class Logits:
    """Of one short prompt.

    Attributes:
        served_by: the module of the model's class.
        seen, read: with the picture, and with its bare marker.
        tokens: file of the tokens of ``read``.
    """

    served_by: str
    seen: np.ndarray
    read: np.ndarray
    tokens: Path


def logits(environment: Environment, model: Path, picture: Path, file: Path, **run: Any) -> Logits:
    done = environment.run("-c", VLM_LOGITS, model, picture, QUESTION, file, **run)
    arrays = np.load(f"{file}.npz")
    return Logits(
        done.stdout.split()[-1], arrays["seen"], arrays["read"], file.with_name(file.name + ".tokens.npy")
    )


def lm_logits(environment: Environment, model: Path, tokens: Path, file: Path) -> np.ndarray:
    """Of the same prompt in mlx-lm, which has no pictures."""
    environment.run("-c", LM_LOGITS, model, tokens, file)
    return np.load(f"{file}.npz")["read"]


def loss(values: np.ndarray, tokens: Path) -> float:
    """Mean cross entropy of each token after those before it."""
    (targets,), (rows,) = np.load(tokens), values.astype(np.float64)
    log_sums = np.log(np.exp(rows[:-1]).sum(axis=-1))
    return float(np.mean(log_sums - rows[np.arange(len(targets) - 1), targets[1:]]))


def quantized_bytes(model: Path) -> int:
    """Of all packed weights: more bits are more bytes, however the tensors are arranged."""
    import mlx.core as mx

    arrays = [array for file in model.glob("*.safetensors") for array in mx.load(str(file)).values()]
    return sum(array.nbytes for array in arrays if array.dtype == mx.uint32)
