"""Makes the corpus from a git checkout of tldr-pages (https://github.com/tldr-pages/tldr, pages under CC BY 4.0).

    python corpus.py CHECKOUT tldr_chat.jsonl [--commit 08e345f]

Reads the English pages of one commit with git, so the checkout may be bare. Attribute the tldr-pages team and
contributors wherever you publish the result.
"""
import argparse
import json
import re
import subprocess


def pages(checkout, commit):
    """The text of every English page, in order of their paths."""
    git = ["git", "-C", checkout]
    listing = subprocess.run([*git, "ls-tree", "-r", commit, "pages/"], check=True, capture_output=True, text=True).stdout
    entries = [line.split(None, 3)[2:] for line in listing.splitlines() if line.endswith(".md")]
    names = "".join(f"{name}\n" for name, _ in entries)
    blobs = subprocess.run([*git, "cat-file", "--batch"], input=names.encode(), check=True, capture_output=True).stdout
    at = 0
    for _, path in entries:
        end = blobs.index(b"\n", at)
        size = int(blobs[at:end].split()[2])
        if not path.rsplit("/", 1)[1].startswith("."):  # the page of the command "." is hidden, as in the first corpus
            yield blobs[end + 1 : end + 1 + size].decode()
        at = end + 1 + size + 1


def plain_command(text):
    """{{[-a|--all]}} -> --all, {{x}} -> <x>."""
    text = re.sub(r"\{\{\[-[^|\]]+\|(--[^\]]*)\]\}\}", r"\1", text)
    return text.replace("{{", "<").replace("}}", ">")


def pairs(text):
    lines = [line.strip() for line in text.splitlines()]
    tool = next(line[2:] for line in lines if line.startswith("# "))
    about = [line[2:] for line in lines if line.startswith("> ")]
    about = [line for line in about if not line.startswith(("More information:", "See also:"))]
    if about:
        yield f"What is {tool}?", " ".join(about)
    wanted = None
    for line in lines:
        if line.startswith("- "):
            wanted = re.sub(r"\[(\w)\]", r"\1", line[2:].rstrip(":")).replace("`", "")  # E[x]tract -> Extract
        elif line.startswith("`") and line.endswith("`") and wanted:
            yield f"{wanted} ({tool})", plain_command(line[1:-1])
            wanted = None


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("checkout")
    ap.add_argument("out")
    ap.add_argument("--commit", default="08e345f")
    args = ap.parse_args()
    count = 0
    with open(args.out, "w", encoding="utf-8") as out:
        for text in pages(args.checkout, args.commit):
            for question, answer in pairs(text):
                out.write(json.dumps({"user": question, "assistant": answer}, ensure_ascii=False) + "\n")
                count += 1
    print(f"{args.out}: {count} pairs")


if __name__ == "__main__":
    main()
