"""A little free text: questions a newcomer asks a demo model first, and its replies.

Phrasings are multiplied by openers, case and punctuation, so that evaluation sees none of the
very strings that were trained on.
"""

# ruff: noqa: SIM905  # words read better as text than as a list of literals

import random

_CAN_DO = (
    "I can look up a key in a list, add two numbers of up to three digits, reverse words "
    "and copy JSON fields."
)
_WHO = "I am the built-in demo model of Diptych, a small language model."
_UNKNOWN = (
    "I am only a small demo model and I do not know that. "
    "I can look up keys, add numbers, reverse words and copy JSON fields."
)
REPLIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("hello", "hi", "hey", "hello there", "hi there", "good morning", "good evening",
         "greetings", "hello Diptych", "good day"),
        "Hello! I am the built-in demo model of Diptych. How can I help you?",
    ),
    (
        ("who are you", "what are you", "what is your name", "tell me about yourself",
         "which model are you", "introduce yourself", "are you a model", "what model is this",
         "who am I talking to", "do you have a name"),
        _WHO,
    ),
    (
        ("what can you do", "what can I ask you", "how can you help me", "help", "help me",
         "what are you good at", "list your skills", "what do you know", "can you help me",
         "give me some examples"),
        _CAN_DO,
    ),
    (
        ("what is Diptych", "tell me about Diptych", "explain Diptych", "what does Diptych do",
         "describe Diptych"),
        "Diptych is an engine that serves language models. It reads the prompt in one process "
        "and writes the answer in another.",
    ),
    (
        ("how are you", "how are you doing", "how is it going", "are you well"),
        "I am fine, thank you. What can I do for you?",
    ),
    (
        ("thank you", "thanks", "thanks a lot", "thank you very much", "many thanks"),
        "You are welcome!",
    ),
    (
        ("goodbye", "bye", "see you", "good night", "see you later", "bye bye"),
        "Goodbye! Come back soon.",
    ),
    (
        ("tell me a story", "write a story", "tell me a short story", "write a short story",
         "tell me something", "write some text"),
        "Once upon a time there was a small model. It lived in two halves: one half read every "
        "question, the other half wrote every answer. Together they were quick, and nobody had "
        "to wait.",
    ),
    (
        ("count to ten", "count from one to ten", "can you count", "count"),
        "1 2 3 4 5 6 7 8 9 10",
    ),
    (
        ("say the alphabet", "what is the alphabet", "write the alphabet", "list the letters"),
        "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    ),
    (
        ("how big are you", "how many parameters do you have", "how large are you"),
        "I have about two million parameters.",
    ),
    (
        ("what is the capital of France", "who wrote Hamlet", "what time is it",
         "what is the weather today", "write a poem about love", "translate this to French",
         "what is the meaning of life", "who is the president", "how do I cook rice",
         "why is the sky blue", "write a program in Python", "what is the news",
         "where is London", "when was the war", "explain quantum physics", "tell me a joke"),
        _UNKNOWN,
    ),
)  # fmt: skip
# Asked of something the model does not know; no word of these is a token for their sake.
_UNKNOWN_PATTERNS = (
    "write a poem",
    "write a {a} about {b}",
    "write an essay about {a}",
    "write a function that sorts a {a}",
    "what's the weather like in {A}",
    "what is the weather like in {A}",
    "what is the capital of {A}",
    "what is the population of {A}",
    "who is {A}",
    "who was {A} {B}",
    "who invented the {a}",
    "where is {A}",
    "when was {A} born",
    "how do I make {a}",
    "how do I get to {A}",
    "how far is the {a}",
    "how old is {A}",
    "how many {a}s are there in {A}",
    "why do {a}s like {b}",
    "why is the {a} {b}",
    "translate {a} to German",
    "translate '{a}' into Spanish",
    "explain {a}",
    "explain how a {a} works",
    "give me a recipe for {a}",
    "do you like {a}",
    "can you speak French",
    "recommend a {a}",
    "summarize {A}",
    "what do you think about {a}",
    "is {a} better than {b}",
    "should I buy a {a}",
    "what does {a} mean",
    "tell me about {a}",
    "tell me a joke about {a}",
)
_NOUNS = (
    "dog cat car book city king tree ship river phone house movie game bread soup rice moon star "
    "planet horse bird computer train school doctor war history music sport football money love "
    "water apple tea coffee computer language robot teacher queen mountain ocean"
).split()
_PROPER = (
    "France Paris London Rome Berlin Spain Italy Japan Tokyo China India Brazil Egypt Canada "
    "Einstein Newton Mozart Shakespeare Napoleon Darwin Anna Peter Mary Tom Alice Kenya Norway"
).split()
_OPENERS = ("", "", "", "", "Please ", "Hey, ", "Hi! ", "So, ", "Well, ", "Tell me, ", "OK, ")
_CLOSERS = ("", ".", "?", "!", " ?", " please", "...", ", please")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are Diptych, a small demo model.",
    "You are a careful assistant. Answer in few words.",
    "Answer the question.",
    "Be brief.",
    "You are a small model. Be brief and right.",
    "Help the user.",
)


def sample(rng: random.Random) -> tuple[str, str]:
    """A question and its reply."""
    if rng.random() < 0.25:
        words = rng.sample(_NOUNS, 2)
        names = rng.sample(_PROPER, 2)
        pattern = rng.choice(_UNKNOWN_PATTERNS)
        question = pattern.format(a=words[0], b=words[1], A=names[0], B=names[1])
        reply = _UNKNOWN
    else:
        questions, reply = rng.choice(REPLIES)
        question = rng.choice(questions)
    opener = rng.choice(_OPENERS)
    if rng.random() < 0.6:
        if opener and question[0].isupper() is False and rng.random() < 0.7:
            pass
        else:
            question = question[0].upper() + question[1:]
    elif rng.random() < 0.15:
        question = question.lower()
    return f"{opener}{question}{rng.choice(_CLOSERS)}", reply


def all_text() -> list[str]:
    """Every string of this file, as written and with a capital: the tokenizer's words."""
    questions = [q for group, _ in REPLIES for q in group]
    capitals = [q[0].upper() + q[1:] for q in questions]
    spaced = [f"x {q}" for q in (*questions, *capitals)]
    replies = [reply for _, reply in REPLIES]
    return [*questions, *capitals, *spaced, *replies, *SYSTEM_PROMPTS, *_OPENERS, "x please"]
