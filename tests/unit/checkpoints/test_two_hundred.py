"""Two hundred damaged files: each refused in one line, none executed, none loaded half.

What the messages say of single mistakes is tested in `test_damage.py`.
"""

import resource
import sys
import time

import damaged_files
import damaged_tensors
import pytest
from damaged_tensors import Case

from imprompt.adapters import VARIANTS, create_adapter
from imprompt.adapters.sites import attention_sites
from imprompt.checkpoints import load_adapter
from imprompt.core.errors import ImpromptError

NUM_FILES = 200
DAMAGES = damaged_tensors.DAMAGES + damaged_files.DAMAGES


@pytest.fixture(scope="module")
def adapters(tiny_unet):
    """One of each variant. diffusers takes resamplers of 4 layers only."""
    return {
        variant: create_adapter(
            tiny_unet, variant, feature_dim=24, id_dim=20, lora_rank=2, resampler_dim=8
        )
        for variant in VARIANTS
    }


def memory_bytes():
    """The most that this process has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_two_hundred_damaged_files(adapters, tiny_unet, tmp_path):
    site_names = [site.name for site in attention_sites(tiny_unet) if site.is_cross]
    start, before = time.process_time(), memory_bytes()
    wrong = []
    for number in range(NUM_FILES):
        break_it = DAMAGES[number % len(DAMAGES)]
        variant = VARIANTS[number // len(DAMAGES) % len(VARIANTS)]
        folder = tmp_path / str(number)
        folder.mkdir()
        case = Case(adapters[variant], site_names, number, folder)
        what = f"{number}: {break_it.__name__} of {variant}"
        break_it(case)
        try:
            loaded = load_adapter(case.path)
            wrong.append(f"{what}: loaded as {loaded.variant}")
        except ImpromptError as error:
            message = str(error)
            if "\n" in message or not message.isprintable():
                wrong.append(f"{what}: not one line: {message!r}")
            if len(message.replace(str(folder), "")) >= 600:
                wrong.append(f"{what}: {len(message)} characters: {message}")
        except BaseException as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        if case.touched.exists():
            wrong.append(f"{what}: executed")
    assert not wrong, "\n".join(wrong)
    assert memory_bytes() - before < 250e6
    assert time.process_time() - start < 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_undamaged_they_are_read(adapters, tiny_unet, tmp_path, variant):
    """So it was the damage that was refused."""
    case = Case(adapters[variant], [], 0, tmp_path)
    for _ in range(6):
        case.write()
        assert load_adapter(case.path).variant == variant
    case.path.write_bytes(case.archive())
    assert load_adapter(case.path).variant == variant
    case.write_header(*case.header())
    assert load_adapter(case.path).variant == variant
