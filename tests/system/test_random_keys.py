"""Keys of random numbers: another tuple, another sequence."""

from hypothesis import given
from hypothesis import strategies as st

from matchai.system.random_keys import seed_sequence

TRIPLES = st.tuples(*[st.one_of(st.integers(0, 3), st.integers(0, 2**70), st.sampled_from([2**32, 2**64]))] * 3)


@given(first=TRIPLES, second=TRIPLES)
def test_numbers_give_the_same_sequence_only_if_they_are_the_same(
    first: tuple[int, int, int], second: tuple[int, int, int]
) -> None:
    same = (seed_sequence(*first).generate_state(4) == seed_sequence(*second).generate_state(4)).all()
    assert same == (first == second)


def test_the_words_of_one_number_are_not_those_of_two() -> None:
    assert (seed_sequence(7, 2**32, 0).generate_state(4) != seed_sequence(7, 0, 1).generate_state(4)).any()
