"""Texts become the token ids that diffusers' pipelines make of them."""

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from tiny_base import TEXT_DIM, TEXT_LENGTH, write_tiny_base, write_tiny_xl_base

from imprompt.bases import load_base
from imprompt.bases.extensions import pipeline_of

TEXTS = ["", "a red cat", "red, red cat and more than is ever read", "a <|endoftext|> cat"]
KINDS = {"sd": write_tiny_base, "xl": write_tiny_xl_base}


@pytest.fixture(params=KINDS)
def base(request, tmp_path):
    return load_base(KINDS[request.param](tmp_path / "tiny"))


def theirs(base, texts):
    """As diffusers' pipelines tokenize."""
    tokenizers = [base.tokenizer, *([base.tokenizer_2] if hasattr(base, "tokenizer_2") else [])]
    ids = []
    for tokenizer in tokenizers:
        told = TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)
        ids.append(
            tokenizer(
                told,
                padding="max_length",
                max_length=TEXT_LENGTH,
                truncation=True,
                return_tensors="pt",
            ).input_ids
        )
    return torch.cat(ids, dim=1)


def test_the_ids_are_those_of_the_pipelines(base):
    assert torch.equal(base.tokenize(TEXTS), theirs(base, TEXTS))


def test_a_word_of_several_vectors_is_read_with_all_of_them(base):
    vectors = torch.randn(3, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    pipeline_of(base).load_textual_inversion({"<thing>": vectors})
    pipeline_of(base).load_textual_inversion({"<one>": vectors[:1]})
    texts = ["a <thing>", "<thing>cat,<one> <thing>", "a cat", "red red red red red <thing> cat"]
    assert torch.equal(base.tokenize(texts), theirs(base, texts))
    first = base.tokenizer.convert_tokens_to_ids("<thing>")
    assert base.tokenize(["a <thing>"])[0, 2:5].tolist() == [first, first + 1, first + 2]


def test_a_word_with_capitals_is_read_with_all_vectors_too(base):
    pipeline_of(base).load_textual_inversion({"EasyThing": torch.ones(2, TEXT_DIM)})
    first = base.tokenizer.convert_tokens_to_ids("EasyThing")
    assert base.tokenize(["a EasyThing"])[0, 2:4].tolist() == [first, first + 1]
