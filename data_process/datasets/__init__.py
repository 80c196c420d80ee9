"""One file a data set. A reader only reads; what is kept is decided in clean.py and dedup.py.

    KIND     the kind of the finished rows: "text", "chat" or "summary"
    SOURCE   where the data come from, printed when they are missing
    LICENSE  as the publisher states it
    read(raw_dir, encoding) -> Iterator[dict | Skip]

A row has the keys of its kind, an `id` that is unique in the set (an int; run.py puts the set's
name before it) and optionally `split`, where the publisher fixed the part it belongs to.

A file may further define (registry.py holds the usual values)
    PACKAGE  (pip requirement, import name, folder): raw files lie inside an installed package
    RULES    which row of the tables in clean.py applies, if not that of its kind
    SHARES   held-out shares, e.g. {"val": 0.02, "test": 0.04}
    IDS      the name before the ids, where two sets are made of the same articles
    finish(row) -> row    the last step, after cleaning and de-duplication
"""
