"""Greedy answers of a model folder or a GGUF file.

    python sample.py --tokenizer FOLDER MODEL ["question" ...]
"""
import argparse

import evaluate
from tokenizers import Tokenizer

QUESTIONS = [
    "hello", "who are you", "help", "thanks", "extract a tar.gz archive", "Extract a tar.gz archive", "how do I list hidden files",
    "show git status", "search for a word in files", "download a file", "what is curl?", "what is tar", "what is grep", "show disk usage",
    "kill process", "find large files", "how do i compress a folder", "copy a file to a remote server", "create a new git branch",
    "count the lines in a file", "list running containers", "what is docker?", "how to mount an iso file", "change the timezone",
    "show the weather", "sort a csv file by the second column", "convert a pdf to text", "List all files, including hidden files (ls)",
    "Extract a (compressed) archive file into the target directory (tar)", "Show the status of the repository (git)",
    "Download a file and save it (wget)", "resume a stopped download with wget", "print the third line of a file", "why is the sky blue?",
]

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("questions", nargs="*")
    ap.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    ap.add_argument("--chat", action="store_true", help="one chat: every question sees the earlier ones and their answers")
    args = ap.parse_args()
    tok, model, history = Tokenizer.from_file(args.tokenizer + "/tokenizer.json"), evaluate.load(args.model), []
    for question in args.questions or QUESTIONS:
        reply = evaluate.answer(model, tok, question, history=history)
        print(f"> {question}\n{reply}\n", flush=True)
        if args.chat:
            history.append((question, reply))
