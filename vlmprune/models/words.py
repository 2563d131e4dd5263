# SPDX-License-Identifier: Apache-2.0
"""Tokens of a tokenizer that carry no content: stop words, punctuation, and tokens of the template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# articles, prepositions, pronouns, auxiliaries and conjunctions
_WORDS = """
    a an the this that these those
    about above across after against along among around as at before behind below beneath beside between
    beyond by down during for from in inside into near of off on onto out outside over past through to toward
    under up upon with within without
    i me my mine we us our ours you your yours he him his she her hers it its they them their theirs
    am is are was were be been being do does did have has had having
    will would shall should can could may might must
    and or but so if then than because while there here
"""
ENGLISH = frozenset(_WORDS.split())  # words that ask, deny or count are not among them
_STARTS = ("▁", "Ġ")  # before a piece that begins a word


def stop_tokens(processor: Any, words: Iterable[str] = ENGLISH) -> tuple[int, ...]:
    """Ids for the option ``skip`` of methods that average over the words of a question.

    Where a tokenizer marks the pieces that begin a word, other pieces are no words. A stop word that is only
    the beginning of a longer word of the text is left out, too.

    Args:
        processor: of the model, or its tokenizer.
        words: in lower case.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    wanted = {word.lower() for word in words}
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    marked = any(piece.startswith(_STARTS) for piece in pieces)
    found = set(tokenizer.all_special_ids)
    for number, piece in enumerate(pieces):
        text = piece.lstrip("".join(_STARTS)).strip().lower()
        begins = piece.startswith(_STARTS) or not marked
        if (begins and text in wanted) or (text and not any(sign.isalnum() for sign in text)):
            found.add(number)
    return tuple(sorted(found))
