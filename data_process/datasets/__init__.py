"""One file a data set. A reader only reads; what is kept is decided in clean.py and dedup.py.

    KIND     the kind of the finished rows: "text", "chat", "summary" or "vqa"
    SOURCE   a Source: where the data come from, and how they are fetched
    LICENSE  as the publisher states it
    read(records) -> Iterator[dict | Skip]

raw.py opens the files and yields records; a reader makes rows of them. A row has the keys of its
kind, an `id` (the record's number; run.py makes it unique and puts the set's name before it) and
optionally `split`, where the publisher fixed the part it belongs to.

A file may further define (registry.py holds the usual values)
    RULES    which row of the tables in clean.py applies, if not that of its kind
    SHARES   held-out shares, e.g. {"val": 0.02, "test": 0.04}
    LAYOUT   how its files are laid out ("csv", "text", …), if the bytes do not tell
    WHOLE    True: records depend on each other across files, so one job reads all of them
    SPLIT_FILES  False: records depend on their neighbours, so a file is read in one piece
    read_dir(raw_dir, encoding)  instead of read, where the files are neither JSON nor text
    PACKAGE  (pip requirement, import name, folder): raw files lie inside an installed package
    IDS      the name before the ids, where two sets are made of the same articles
    REFUSED_COUNT  True: a row that a rule refuses still counts as the first copy of its text, so
             that such sets agree on which copy of an article stays
    finish(row) -> row    the last step, after cleaning and de-duplication
"""
