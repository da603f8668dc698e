"""Lines of WordNet's files, and the nouns below a head, against a walk up from every noun."""

from __future__ import annotations

import random

import pytest

from manifold_cl.streams.wordnet import Synset, kinds_of, read_synsets, synset_of


def test_a_wordnet_line_is_taken_apart() -> None:
    line = (
        "00001740 29 v 02 draw_in 0 inhale 1 003 * 00005041 v 0000 ;c 06037666 n 0000 ;u 07075172 n 0000 "
        '02 + 02 00 + 08 00 | take in air; "inhale; exhale"; "draw in breath"  '
    )
    synset = synset_of(line)
    assert (synset.offset, synset.lexfile, synset.lemma) == ("00001740", "29", "draw in")
    assert synset.topics == ("06037666",)
    assert synset.definition == "take in air"


def test_word_counts_are_hexadecimal() -> None:
    words = " ".join(f"w{i} 0" for i in range(17))
    assert synset_of(f"1 05 n 11 {words} 001 ;c 42 n 0000 | a gloss").topics == ("42",)


def test_a_kind_and_an_instance_are_both_below_what_they_point_to() -> None:
    line = "02084071 05 n 01 dog 0 003 @ 02083346 n 0000 @i 01317541 n 0000 ~ 01322604 n 0000 | a canine"
    assert synset_of(line).hypernyms == ("02083346", "01317541")


def noun(name: str, *hypernyms: str) -> Synset:
    return Synset(f"#{name}", "05", "n", name, f"gloss of {name}", (), tuple(f"#{h}" for h in hypernyms))


def test_kinds_of_two_heads_belong_to_neither() -> None:
    synsets = [
        noun("animal"),
        noun("pet", "animal"),
        noun("bird", "animal"),
        noun("parrot", "pet", "bird"),
        noun("cat", "pet"),
    ]
    found = [(synset.lemma, head) for synset, head in kinds_of(synsets, ["pet", "bird"])]
    assert found == [("pet", "pet"), ("bird", "bird"), ("cat", "pet")]


def test_of_two_senses_the_one_with_more_below_it_is_the_head() -> None:
    wide, narrow = noun("crane"), Synset("#other", "05", "n", "crane", "another", (), ())
    synsets = [narrow, wide, noun("whooper", "crane")]
    assert [(s.offset, h) for s, h in kinds_of(synsets, ["crane"])] == [("#crane", "crane"), ("#whooper", "crane")]


def test_an_unknown_head_is_named() -> None:
    with pytest.raises(ValueError, match="unknown head 'brid', did you mean bird"):
        list(kinds_of([noun("bird")], ["brid"]))


def test_kinds_agree_with_a_walk_up_from_every_noun() -> None:
    rng = random.Random(0)
    synsets = [noun(f"n{i}", *(f"n{rng.randrange(i)}" for _ in range(rng.randrange(1, 3)))) for i in range(1, 200)]
    synsets.insert(0, noun("n0"))
    heads = ["n3", "n8", "n20"]
    above = {s.offset: s.hypernyms for s in synsets}

    def is_below(offset: str, head: str) -> bool:
        return offset == f"#{head}" or any(is_below(up, head) for up in above[offset])

    expected = []
    for synset in synsets:
        owners = [head for head in heads if is_below(synset.offset, head)]
        if len(owners) == 1:
            expected.append((synset.offset, owners[0]))
    assert len(expected) > 20
    assert [(synset.offset, head) for synset, head in kinds_of(synsets, heads)] == expected


@pytest.mark.slow
@pytest.mark.stream
def test_one_lexicographer_file_is_the_part_of_all_nouns_with_its_number() -> None:
    some = read_synsets("noun", lexfile="20")
    assert some == [synset for synset in read_synsets("noun") if synset.lexfile == "20"]
    assert len(some) == 8030
