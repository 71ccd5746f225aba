"""Made chats, a few hundred: who the model is, spelling, counting letters, small sums. All true by construction."""

from collections import Counter
from collections.abc import Iterator, Sequence

from pipelines.docstrings import Question

IAM = "I am nanochat, a small language model. I was trained from nothing by the pipeline you are running."
IDENTITY = {
    IAM: (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Hello, who are you?",
        "Tell me about yourself.",
        "Are you a human?",
        "Are you nanochat?",
        "Introduce yourself.",
    ),
    "Hello! I am nanochat. Ask me about the Python standard library.": ("Hello", "Hello!", "Hi", "Hi there", "Hey"),
    "I have read the Python standard library, so I can say what its modules, classes and functions are for.": (
        "What can you do?",
        "What do you know?",
        "What can I ask you?",
        "How can you help me?",
        "What were you trained on?",
    ),
    "I am small, so I am often wrong. Check what I say.": (
        "Are you always right?",
        "Can I trust you?",
        "How clever are you?",
        "Do you make mistakes?",
    ),
    "You are welcome!": ("Thank you", "Thanks!", "Thank you!"),
    "Goodbye!": ("Goodbye", "Bye", "Bye!"),
}
WORDS = 120  # most frequent words that are spelt and counted
SUMS = 160


def procedural_chats(words: Sequence[str]) -> Iterator[Question]:
    """Identity, spelling and letters of the most frequent of `words`, and sums; the same for the same words."""
    for answer, asks in IDENTITY.items():
        for ask in asks:
            yield Question(f"identity:{ask}", ask, answer)
    plain = Counter(word for word in words if word.isascii() and word.isalpha() and word.islower())
    frequent = [word for word in plain if 4 <= len(word) <= 10]
    frequent = sorted(frequent, key=lambda word: (-plain[word], word))[:WORDS]
    for word in frequent:
        yield Question(f"spelling:{word}", f"Spell the word {word}.", f"{word} is spelt {' '.join(word)}.")
    for number, word in enumerate(frequent):
        letter = word[number % len(word)]
        count = word.count(letter)
        times = "once" if count == 1 else "twice" if count == 2 else f"{count} times"
        yield Question(
            f"letters:{word}",
            f"How often does the letter {letter} occur in the word {word}?",
            f"The letter {letter} occurs {times} in {word}.",
        )
    yield from _sums()


def _sums() -> Iterator[Question]:
    for n in range(SUMS):
        a, b = (n * 37) % 61, (n * 53 + 7) % 47  # 61 and 47 are prime, so no pair comes twice
        if a < b:
            yield Question(f"sum:{a}+{b}", f"What is {a} + {b}?", f"{a} + {b} = {a + b}.")
        else:
            yield Question(f"sum:{a}-{b}", f"What is {a} - {b}?", f"{a} - {b} = {a - b}.")
