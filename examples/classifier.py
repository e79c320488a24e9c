"""Train a classifier of texts on an encoder (made-up texts, or TRAIN.csv TEST.csv --label COLUMN),
and see how much of its accuracy int8 keeps."""
# needs: minilm
# slow

import argparse
import random
import sys
from pathlib import Path

import torch

import deepseek
from deepseek.data import LabelledText, read_labelled
from deepseek.evaluate import accuracy, compare_accuracy
from deepseek.face import load_encoder_engine
from deepseek.models import grow_encoder
from deepseek.optim import AdamW
from deepseek.train import ClassifierSettings, fit_classifier

parser = argparse.ArgumentParser()
parser.add_argument("train", nargs="?")
parser.add_argument("test", nargs="?")
parser.add_argument("--label", default="label", help="the column of the labels")
parser.add_argument("--to", default="classifier", help="folder of the bundle")
parser.add_argument("--grow", action="store_true", help="to the shape of BERT-base first")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--rate", type=float, default=1e-4)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
options = parser.parse_args()
torch.set_num_threads(options.threads)


def made_up(count: int, seed: int) -> list[LabelledText]:
    draw = random.Random(seed)
    things = {"animal": ["cat", "horse", "goose"], "food": ["bread", "soup", "cheese"]}
    labels = [draw.choice(list(things)) for _ in range(count)]
    says = ["I saw a {}.", "Is there any {} here?", "She talks of {} all day."]
    texts = [draw.choice(says).format(draw.choice(things[label])) for label in labels]
    return [LabelledText(text, label) for text, label in zip(texts, labels, strict=True)]


train, test = made_up(64, 1), made_up(64, 2)
if options.train and options.test:
    train = read_labelled(options.train, label=options.label)
    test = read_labelled(options.test, label=options.label)

model = deepseek.load("all-minilm-l6-v2", dtype="float32")
if options.grow:
    model = grow_encoder(model, width=2, depth=2)


def told(now):
    if now.step % 20 == 0 or now.step == now.num_steps:
        words = f"step {now.step} of {now.num_steps}: loss {now.loss:.3f}, {now.seconds:.0f} s"
        print(words, file=sys.stderr)


settings = ClassifierSettings(
    epochs=options.epochs,
    optimizer=AdamW(rate=options.rate, betas=(0.9, 0.999), weight_decay=0.01),
)
fit_classifier(model, train, settings, on_step=told)
deepseek.save(model, Path(options.to))

whole = accuracy(model.classify, test)
small = accuracy(load_encoder_engine(options.to, scheme="int8").classify, test)
paired = compare_accuracy(whole.is_right, small.is_right)
print("float32:", whole.measurements[0].value, whole.measurements[0].spread)
print("int8:   ", small.measurements[0].value, small.measurements[0].spread)
print(f"kept {paired.kept:.2%}, McNemar p = {paired.p_value:.3f}")
