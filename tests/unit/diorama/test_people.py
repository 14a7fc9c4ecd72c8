"""Characters: numbered, told apart, and kept from training where they are measured."""

from itertools import combinations

from imprompt.diorama import (
    character_number,
    character_of_number,
    differences,
    gallery,
    portrait,
    training_portrait,
)
from imprompt.diorama.people import PLAIN_FACTORS, training_character


def test_numbers_and_characters_are_one_to_one():
    assert {character_number(character_of_number(n)) for n in range(12_960)} == set(range(12_960))


def test_the_gallery_is_of_a_hundred_who_differ_visibly():
    assert len(gallery()) == len(set(gallery())) == 100
    for first, second in combinations(gallery(), 2):
        found = differences(first, second)
        assert len(found) >= 3 and len(found & set(PLAIN_FACTORS)) >= 2


def test_nobody_of_the_gallery_is_trained_on():
    trained = {training_character(number) for number in range(3000)}
    assert len(trained) > 2000 and not trained & set(gallery())


def test_a_portrait_shows_its_character_and_differs_otherwise():
    scenes = [training_portrait(seed) for seed in range(16)]
    assert {scene.character for scene in scenes[:8]} == {training_character(0)}
    assert scenes[8].character == training_character(1)
    assert len({scene.turn_degrees for scene in scenes}) == 16
    assert len({scene.style for scene in scenes}) > 2
    assert portrait(3, gallery()[0], style="neon").style == "neon"
