"""Annotated images: every good object is read, and every fault is reported and costs no more."""

import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simsiam.detection.annotations import (
    decode_run_lengths,
    keep_masked_objects,
    open_annotated,
)
from simsiam.detection.metrics import decode_masks, encode_mask
from simsiam.detection.pictures import _arrange
from simsiam.detection.transfer_record import TransferRecord, print_record
from simsiam.errors import UsageError, WorkFailed

pytest.importorskip("pycocotools")
CAR = ("car", (11, 21, 30, 40), 0)


def xml(objects, size=(60, 80), extra="") -> str:
    """Return a VOC annotation; a box is xmin, ymin, xmax, ymax, counted from 1."""
    ends = ("xmin", "ymin", "xmax", "ymax")
    rows = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{end}>{value}</{end}>" for end, value in zip(ends, box))
        + "</bndbox></object>"
        for name, box, difficult in objects
    )
    sides = (
        f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
        if size
        else ""
    )
    return f"<annotation>{sides}{rows}{extra}</annotation>"


def voc(folder: Path, files: dict[str, str], sets: dict[str, list[str]], size=(60, 80)) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for name, text in files.items():
        (folder / "Annotations" / f"{name}.xml").write_text(text)
        Image.new("RGB", size[::-1], "gray").save(folder / "JPEGImages" / f"{name}.jpg")
    for name, listed in sets.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(
            "".join(f"{stem}\n" for stem in listed)
        )
    return folder


def coco(
    folder: Path,
    annotations: list,
    split="train",
    images=3,
    size=(60, 80),
    categories=("cat", "dog"),
) -> Path:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / f"{split}2017").mkdir()
    rows = [
        {"id": 7 + i, "file_name": f"{i}.png", "height": size[0], "width": size[1]}
        for i in range(images)
    ]
    for i in range(images):
        Image.new("RGB", size[::-1], "gray").save(folder / f"{split}2017" / f"{i}.png")
    kinds = [{"id": 3 + 2 * i, "name": name} for i, name in enumerate(categories)]
    content = {"images": rows, "annotations": annotations, "categories": kinds}
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return folder


def test_voc_counts_from_one_and_includes_its_last_pixel(tmp_path):
    opened = open_annotated(
        voc(tmp_path, {"a": xml([CAR, ("bus", (1, 1, 80, 60), 1)])}, {"train": ["a"]})
    )
    (objects,) = opened.splits["train"].objects
    assert opened.splits["train"].classes == ("bus", "car") and opened.metric == "voc"
    assert objects.boxes.tolist() == [[10, 20, 30, 40], [0, 0, 80, 60]]
    assert objects.labels.tolist() == [1, 0] and objects.difficult.tolist() == [False, True]


def test_years_are_joined_and_an_image_set_can_be_named(tmp_path):
    for year, names in {"VOC2007": "abc", "VOC2012": "de"}.items():
        sets = {"train": [names[0]], "val": [names[1]]} | (
            {"test": [names[2]]} if len(names) > 2 else {}
        )
        voc(tmp_path / year, {name: xml([CAR]) for name in names}, sets)
    keys = {k: list(v.images.keys) for k, v in open_annotated(tmp_path).splits.items()}
    assert keys == {
        "train": ["VOC2007/JPEGImages/a.jpg", "VOC2012/JPEGImages/d.jpg"],
        "val": ["VOC2007/JPEGImages/b.jpg", "VOC2012/JPEGImages/e.jpg"],
        "test": ["VOC2007/JPEGImages/c.jpg"],
    }
    paper = open_annotated([tmp_path / "VOC2007", f"{tmp_path / 'VOC2012'}:train"])
    assert [len(paper.splits[split]) for split in ("train", "val", "test")] == [2, 1, 1]
    assert paper.name == "VOC2007+VOC2012"
    assert paper.splits["val"].images.read(0).shape == (60, 80, 3)
    with pytest.raises(UsageError, match="did you mean 'train'"):
        open_annotated(f"{tmp_path / 'VOC2012'}:trian")


def test_faults_in_voc_are_reported_and_cost_nothing_else(tmp_path):
    files = {
        "good": xml(
            [CAR, ("car", (5, 5, 4, 9), 0), ("car", (70, 50, 200, 90), 0)]
        ),  # the second has no area
        "broken": "<annotation><object>",
        "other_size": xml([CAR], size=(99, 99)),
        "no_size": xml([CAR], size=None),
        "no_numbers": xml([("car", ("x", 1, 2, 3), 0), ("", (1, 1, 9, 9), 0), CAR]),
        "empty": xml([]),
        **{f"more{i}": xml([CAR]) for i in range(4)},
    }
    folder = voc(tmp_path, files, {"train": [*files, "not_there"]})
    (folder / "JPEGImages" / "more3.jpg").write_bytes(b"\xff\xd8\xffnothing")
    opened = open_annotated(folder)
    part = opened.splits["train"]
    names = [Path(key).stem for key in part.images.keys]
    assert names == ["good", "no_size", "no_numbers", "empty", "more0", "more1", "more2"]
    assert [len(o) for o in part.objects] == [2, 1, 1, 0, 1, 1, 1]
    assert part.objects[0].boxes.tolist()[1] == [69, 49, 80, 60]  # clipped at the edge
    assert part.objects[1].size == (60, 80)
    assert opened.faults.counts == {
        "image left out": 4, "object left out": 2, "degenerate box dropped": 1,
        "box cut at the edge": 1,
    }  # fmt: skip
    lines = "\n".join(opened.faults.lines)
    for text in ("broken.xml\tnot XML", "other_size.jpg\t80 x 60 pixels, annotated as 99 x 99",
                 "not_there.xml\tNo", "no_numbers.xml\tobject 1 has no box of four numbers",
                 "object 2 has no name", "more3.jpg\t",
                 "good.jpg\tthe box 4, 4, 4, 9 of a car has no area"):  # fmt: skip
        assert text in lines, text
    learned = part.trainable_subset()
    assert len(learned) == 6 and all(
        len(o) for o in learned.objects
    )  # the image without objects is only tested on


def test_coco_is_read_alike(tmp_path):
    square = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
    rows = [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [10, 10, 20, 20],
         "segmentation": [square]},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 80, 60], "iscrowd": 1,
         "segmentation": {"counts": [0, 4800], "size": [60, 80]}},
        {"id": 3, "image_id": 8, "category_id": 5, "bbox": [5, 5, 0, 9], "segmentation": [square]},
        {"id": 4, "image_id": 8, "category_id": 5, "bbox": [5, 5, 9, 9], "segmentation": [[1, 2]]},
        {"id": 5, "image_id": 99, "category_id": 5, "bbox": [5, 5, 9, 9]},
        {"id": 6, "image_id": 8, "category_id": 4, "bbox": [5, 5, 9, 9]},
        {"id": 7, "image_id": 8, "category_id": 5, "bbox": [5, None, 9, 9]},
        "nothing",
    ]  # fmt: skip
    opened = open_annotated(coco(coco(tmp_path, rows), rows[:1], "val"))
    train, val = opened.splits["train"], opened.splits["val"]
    assert train.classes == val.classes == ("cat", "dog") and opened.metric == "coco"
    assert [len(o) for o in train.objects] == [2, 1, 0]
    assert train.objects[0].labels.tolist() == [1, 0]
    assert train.objects[0].boxes.tolist() == [[10, 10, 30, 30], [0, 0, 80, 60]]
    assert [len(o) for o in train.trainable_subset().objects] == [1, 1]
    counts = opened.faults.counts
    assert counts["object left out"] == 4 and counts["degenerate box dropped"] == 1
    masked = keep_masked_objects(opened)
    assert [len(o) for o in masked.splits["train"].objects] == [2, 0, 0]
    assert [mask.sum() for mask in decode_masks(masked.splits["train"].objects[0])] == [400, 4800]
    assert masked.faults.lines[-1] == "train2017/1.png\ta dog has no mask"
    (line,) = [line for line in opened.faults.lines if "annotations[4]" in line]
    assert line.split("\t")[1] == "annotations[4] belongs to image 99, which is not in the file"
    joined = train.concat(val)
    assert len(joined) == 6 and joined.images.read(5).shape == (60, 80, 3)
    assert joined.objects[3].labels.tolist() == [1]


def test_a_json_file_next_to_its_images_is_coco_too(tmp_path):
    coco(tmp_path / "made", [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 1, 9, 9]}])
    os.rename(tmp_path / "made" / "train2017", tmp_path / "train")
    os.rename(
        tmp_path / "made/annotations/instances_train2017.json",
        tmp_path / "train/_annotations.coco.json",
    )
    opened = open_annotated(tmp_path)
    train = opened.splits["train"]
    assert train.classes == ("cat",) and train.images.read(0).shape == (60, 80, 3)


TRAIN_JSON = "annotations/instances_train2017.json"


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda f: (f / TRAIN_JSON).write_text("{"), WorkFailed, "cannot read"),
        (lambda f: (f / TRAIN_JSON).write_text("{}"), WorkFailed, "is not in COCO format"),
        (
            lambda f: [path.unlink() for path in (f / "train2017").iterdir()],
            WorkFailed,
            "3 of 3 annotated images",
        ),
        (
            lambda f: os.rename(f / "annotations", f / "labels"),
            UsageError,
            "is not a source of annotated images",
        ),
    ],
)
def test_an_unusable_source_is_one_line(tmp_path, damage, error, message):
    damage(coco(tmp_path, [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 1, 9, 9]}]))
    with pytest.raises(error, match=message):
        open_annotated(tmp_path)


def test_boxes_stay_with_their_images(tmp_path):
    files = {name: xml([("car", (i + 1, 1, 70, 50), 0)]) for i, name in enumerate("abcdef")}
    part = open_annotated(voc(tmp_path, files, {})).splits["train"]
    rest, held_out = part.hold_out(2)
    keys = sorted([*rest.images.keys, *held_out.images.keys])
    assert len(rest) == 4 and keys == list(part.images.keys)
    for subset in (rest, held_out, rest.concat(held_out)):
        for key, objects in zip(subset.images.keys, subset.objects):
            assert np.isclose(objects.boxes[0, 0], "abcdef".index(Path(key).stem))


# --- files of strangers ---------------------------------------------------------------------------

BOX = {"image_id": 7, "category_id": 3, "bbox": [10, 10, 30, 30]}


def opened_line(source: Path) -> str:
    """Open a source, and use its masks; return its error, one short line, or its faults."""
    try:
        opened = open_annotated(source)
        for source in (opened, keep_masked_objects(opened)):
            for objects in (
                objects for split in source.splits.values() for objects in split.objects
            ):
                assert decode_masks(objects).shape == (len(objects), *objects.size)
    except (UsageError, WorkFailed) as error:
        assert len(str(error)) < 1000
        return str(error)
    assert all(len(line) < 1000 for line in opened.faults.lines)
    return " ".join(opened.faults.lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category_id": ["x"]}, "has category ['x']"),
        ({"category_id": {}}, "has category {}"),
        ({"image_id": [1]}, "belongs to image [1]"),
        ({"image_id": 10**400}, "belongs to image 1000"),
        ({"bbox": [10**400, 0, 1, 1]}, "has the box [1000"),
        ({"bbox": [1e308, 1e308, 1e308, 1e308]}, "has no area in the image"),
        ({"bbox": ["a", None, [], {}]}, "has the box"),
        ({"bbox": list(range(100_000))}, "has the box"),
        ({"segmentation": [["1", "2", "3", "4", "5", "6"]]}, "has no mask"),
        ({"segmentation": [[1e300, 0, 1e300, 9, 0, 9]]}, "has no mask"),
        ({"segmentation": [[True] * 6]}, "has no mask"),
        ({"segmentation": {"counts": [-5, 4805], "size": [60, 80]}}, "has no mask"),
        ({"segmentation": {"counts": [10**9, 10**9], "size": [60, 80]}}, "has no mask"),
        ({"segmentation": {"counts": [10, 4790], "size": [60, 10**9]}}, "has no mask"),
        ({"segmentation": {"counts": [10, "x"], "size": [60, 80]}}, "has no mask"),
        ({"segmentation": {"counts": "o" * 40, "size": [60, 80]}}, "has no mask"),
        ({"segmentation": {"counts": "zzzz", "size": [60, 80]}}, "has no mask"),
        ({"segmentation": {"counts": "\u20ac", "size": [60, 80]}}, "has no mask"),
    ],
)  # fmt: skip
def test_a_strange_object_costs_only_itself(change, said, tmp_path):
    good = [BOX | {"image_id": 7 + i, "segmentation": [[10, 10, 40, 10, 40, 40]]} for i in range(8)]
    source = coco(tmp_path, [good[0] | change, *good], images=8)
    assert said in opened_line(source)
    assert sum(map(len, open_annotated(source).splits["train"].objects)) >= 8


def test_compressed_run_lengths_are_read_as_pycocotools_writes_them(tmp_path):
    mask = np.zeros((60, 80), np.uint8)
    mask[5:50, 7:60], mask[9:20, 30:40] = 1, 0
    encoded = encode_mask(mask)["counts"].decode()
    lengths = decode_run_lengths(encoded)
    assert sum(lengths) == 60 * 80 and sum(lengths[1::2]) == mask.sum()
    segmentation = {"counts": encoded, "size": [60, 80]}
    source = coco(tmp_path, [BOX | {"segmentation": segmentation}] * 8, images=8)
    (objects, *_) = open_annotated(source).splits["train"].objects
    assert (decode_masks(objects)[0] == mask).all()


def change_coco(source: Path, **changes) -> Path:
    path = source / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return source


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"categories": [{"id": 3, "name": "a"}, {"id": "x", "name": "b"}]}, ""),
        ({"categories": [{"id": [3], "name": "a"}]}, "has no valid id"),
        ({"categories": [{"id": 3, "name": "\x1b[2J" * 900}, {"id": 3}]}, "another name elsewhere"),
        ({"categories": [{"id": 3, "name": ["deep"] * 9000}, {"id": 3}]}, "another name elsewhere"),
        ({"annotations": {"a": 1}}, "no object is annotated"),
        ({"images": [3, None, []]}, "has no unique id or no file_name"),
        ({"images": [{"id": 7, "file_name": "a\0b.png"}]}, "leads out of the folder"),
        ({"images": [{"id": 7, "file_name": "\ud800.png"}]}, "leads out of the folder"),
        ({"images": [{"id": 7, "file_name": "/etc/passwd"}]}, "leads out of the folder"),
        ({"images": [{"id": 7, "file_name": "../../../x.png"}]}, "leads out of the folder"),
    ],
)
def test_strange_lists_are_one_line(changes, said, tmp_path):
    source = coco(tmp_path / "in", [BOX | {"image_id": 7 + i} for i in range(8)], images=8)
    line = opened_line(change_coco(source, **changes))
    assert said in line and "\n" not in line


def test_nested_json_is_one_line(tmp_path):
    source = coco(tmp_path, [BOX])
    path = source / "annotations" / "instances_train2017.json"
    path.write_text("[" * 100_000)
    with pytest.raises(WorkFailed, match=r"cannot read .*json: maximum recursion depth"):
        open_annotated(source)


@pytest.mark.parametrize(
    "text",
    [
        '<?xml version="1.0" encoding="klingon"?><annotation/>',
        "<annotation>" * 50_000,
        '<!DOCTYPE a [<!ENTITY a "' + "x" * 99 + '">'
        + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 9 if i else "&a;" * 9}">' for i in range(9))
        + "]><annotation>&a8;</annotation>",
        "",
        "\0",
    ],
)  # fmt: skip
def test_strange_xml_costs_only_its_image(text, tmp_path):
    files = {name: xml([CAR]) for name in "abcdefgh"}
    source = voc(tmp_path / "in", files | {"x": text}, {"train": ["x", *files, "../../secret"]})
    (tmp_path / "secret.xml").write_text(xml([("secret", (1, 1, 30, 30), 0)]))
    opened = open_annotated(source)
    faults = " ".join(opened.faults.lines)
    assert "not XML" in faults and "its name leads out of the folder" in faults
    assert opened.splits["train"].classes == ("car",)
    assert all(len(line) < 1000 and "\n" not in line for line in opened.faults.lines)


def test_names_of_classes_are_escaped_on_terminal_and_picture(tmp_path, capsys):
    names = ("a\nb", "\x1b[2J", "[/]")
    boxes = [BOX | {"image_id": 7 + i, "category_id": 3 + 2 * (i % 3)} for i in range(9)]
    source = open_annotated(coco(tmp_path, boxes, images=9, categories=names))
    classes = source.splits["train"].classes
    assert classes == names  # the true names
    _arrange([(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)))], classes)
    aps = {"metric": "", "AP": 1.0, "AP50": 1.0, "AP75": 1.0}
    metrics = {"voc_box": aps | {"AP50_of_class": dict.fromkeys(classes, 1.0)}}
    values = {f.name: f.name for f in fields(TransferRecord)} | {"metrics": metrics}
    values |= {"init": {"from": "[/]\x1b"}, "tested_by": "voc_box"}
    print_record(TransferRecord(**values))
    said = capsys.readouterr().out
    assert "\x1b" not in said and "a\\nb 1.0, \\x1b[2J 1.0, [/] 1.0" in said
