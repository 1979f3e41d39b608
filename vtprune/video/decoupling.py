"""What a question about a clip asks to be seen: a list of things, or, of a course of events, nothing that has a name.

The two ways of QuoTA (arXiv 2503.08689) to ask about frames; here a question is taken apart by rules, or by a model.
"""

from __future__ import annotations

import ast
import re
from itertools import groupby
from typing import Any

import torch

_EVENT_WORDS = """
why how happen happens happened happening order sequence process feel feels felt mood emotion plot story
storyline theme summary summarize summarise describe compare purpose reason overall goal goals objective
objectives intention intent deduce deduced infer inferred conclude conclusion relationship interact interaction
interactions behavior behaviour significance importance evolve react reaction
"""
_EMPTY_WORDS = """
a an the this that these those there here it its he she they him his her them their who whom whose what which
where when i me my we us our you your c c's is are was were be am do does did done has have had can could will
would should may might must isn't aren't doesn't didn't what's who's where's it's he's she's they're there's
that's and or but not no yes as if then so than of in on at to from by with without for into onto out off up
down over under above below behind beside between near next around across along against through throughout
past about toward towards within away together back before after while until again also any some all both each
every many much more most other others another several group groups very too just only still one two three
four five six seven eight nine ten first second third last final finally once twice time times begin begins
start starts started end ends ended middle left right top bottom side front video clip frame frames scene
scenes image picture content show shows shown see sees seen visible appear appears color colour colors colours
number count kind kinds type types sort shape size name called thing things object objects person's look looks
like wear wears hold holds made main primary key role critical question answer answers option options option's
choice choices given letter word phrase single briefly please directly choose select best correct based
"""
_ACTION_WORDS = """
go goes went gone come comes came get gets got give gives gave take takes took taken put puts pick picks picked
move moves moved turn turns turned walk walks walked run runs ran jump jumps jumped sit sits sat stand stands
stood throw throws threw thrown catch catches caught fall falls fell pass passes passed use uses used try tries
tried stop stops stopped keep keeps kept let lets eat eats ate say says said talk talks talked play plays played
push pushes pushed pull pulls pulled open opens opened close closes closed carry carries carried bring brings
brought lift lifts lifted bend bends bent lean leans leaned reach reaches reached touch touches touched hit hits
kick kicks kicked raise raises raised drop drops dropped want wants wanted need needs needed perform performs
performed stir stirs stirred cut cuts wash washes washed wipe wipes wiped pour pours poured prepare prepares
prepared repair repairs repaired remove removes removed ride rides rode climb climbs climbed swim swims swam
dance dances danced sing sings sang smile smiles smiled laugh laughs laughed cry cries cried leave leaves make
makes change changes changed help helps helped
"""
_NOUN_WORDS = """
building ceiling clothing drawing dumpling earring frosting icing king painting pudding railing ring sling spring
stocking string swing wedding wing
"""
_OF_EVENTS, _EMPTY, _NOUNS = (frozenset(words.split()) for words in (_EVENT_WORDS, _EMPTY_WORDS, _NOUN_WORDS))
_ACTIONS = frozenset(_ACTION_WORDS.split())
_OPTION = re.compile(r"^\s*\(?[A-Ea-e1-5][).:]\s")
_WORD = re.compile(r"[a-z0-9à-ÿ]+(?:['-][a-z0-9à-ÿ]+)*|[^\w\s]")
_MEASURED = re.compile(r"\bhow (?:many|much|long|often|far|old|big|tall)\b")
_PLAN = """Question about a video: {question}
Work in three steps and write each on a line of its own.
Step 1: does the answer depend on seeing certain concrete things? Write yes or no.
Step 2: if yes, write a Python list of things that could be seen, as strings; otherwise write null.
Step 3: take out of that list whatever is abstract or cannot be seen, and write what is left as a Python list, or null.
Example for "What is the man in the red coat carrying?":
Step 1: yes
Step 2: ["man", "red coat", "carried object"]
Step 3: ["man", "red coat"]
Example for "How many dogs run past the fountain?":
Step 1: yes
Step 2: ["dogs", "fountain"]
Step 3: ["dogs", "fountain"]
Example for "Why does the mood change in the end?":
Step 1: no
Step 2: null
Step 3: null
"""


def decouple(question: str) -> tuple[str, ...]:
    """The things a question names, by rules for English: runs of words that are neither function words nor verbs.

    Empty for a question about a reason, a manner or a course of events, and where nothing is left. Lines of options are
    left out.
    """
    lines = [line for line in question.casefold().splitlines() if not _OPTION.match(line)]
    words = _WORD.findall(_MEASURED.sub(" ", " ".join(lines).replace("\u2019", "'")))
    if any(word in _OF_EVENTS for word in words):
        return ()
    runs = groupby(words, key=_names_nothing)
    return tuple(dict.fromkeys(" ".join(run) for nothing, run in runs if not nothing))


def _names_nothing(word: str) -> bool:
    """Whether a word is a mark, a function word or, as far as can be told, a verb."""
    acts = word in _ACTIONS or (word.endswith("ing") and word not in _NOUNS)
    return acts or word in _EMPTY or not word[0].isalnum()


@torch.no_grad()
def decouple_by_model(model: Any, processor: Any, question: str, *, max_new_tokens: int = 160) -> tuple[str, ...]:
    """The same, asked of the language model itself, without any picture. See `things_of_plan` for what is read."""
    text = _text_prompt(processor, _PLAN.format(question=question))
    tokenizer = getattr(processor, "tokenizer", processor)
    given = tokenizer([text], return_tensors="pt").to(model.device)
    written = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)
    return things_of_plan(tokenizer.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def things_of_plan(answer: str) -> tuple[str, ...]:
    """The list behind "step 3:" where "step 1:" says yes; empty for any other answer. Nothing of it is run as code."""
    said = re.search(r"step\s*1\s*:\s*(yes|no)", answer.casefold())
    written = re.search(r"step\s*3\s*:\s*(\[[^\[\]]{0,2000}\])", answer.casefold())
    if said is None or said[1] != "yes" or written is None:
        return ()
    try:
        found = ast.literal_eval(written[1])
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ()
    return tuple(dict.fromkeys(thing.strip() for thing in found if isinstance(thing, str) and thing.strip()))


def _text_prompt(processor: Any, text: str) -> str:
    if not getattr(processor, "chat_template", None):
        return text
    chat = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    made: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return made
