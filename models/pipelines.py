"""Which family opens a folder or hub id in diffusers' layout: its index decides, or the user's reasonx.json."""
from models import marigold, rgbx
from models.diffusers_files import FAMILY, INDEX, pipeline_folder, read_part
from models.e2e import E2E, PUBLISHED, WANT
from models.marigold import Marigold
from models.rgbx import RGBX

CLASSES = dict.fromkeys(marigold.PIPELINES, Marigold) | {rgbx.PIPELINE: RGBX}


def open_pipeline(spec):
    """Open a predictor from a folder in diffusers' layout or a hub id.

    raises  FileNotFoundError: a file is missing; ValueError: a pipeline that is not implemented, or whose target
            nobody says
    """
    if spec in PUBLISHED:
        return E2E.load(spec)
    folder = pipeline_folder(spec)
    if (folder / FAMILY).is_file():
        return E2E.load(folder)
    kind = read_part(folder / INDEX).get("_class_name")
    if kind not in CLASSES:                                           # before any weights are read
        raise ValueError(f"predictor: {folder / INDEX} has _class_name = {kind!r}; want one of "
                         f"{', '.join(CLASSES)}. Of an E2E-FT network write {folder / FAMILY}: {WANT}")
    return CLASSES[kind].load(folder)
