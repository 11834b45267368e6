"""From public downloads to one data folder, in constant memory, each record accounted for.

sources.py       which files are read, and as what
read.py          their records, from any place on, through shards.formats; parse.py, fields.py, tables.py: what formats
                 that no recipe reads in place hold
outputs.py       raw outputs and logs of ids, appended to while reading; appended.py: how, and a full disk
ids.py           which ids repeat or are unknown, found on disk
finish.py        rows with such ids refused or left out; regroup.py: one training record a query
journal.py       how far it is; conversion.py: the whole, from the sources to `dataset.json`
"""
