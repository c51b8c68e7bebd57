"""The inner side of the code sandbox: what runs in processes of its own, with the standard library alone.

    kernel       the few system calls that Python 3.11 does not offer
    folders      removing what a program has left in folders
    supervisor   the process that sets up, watches and cleans up after one program
    program      what runs inside, around the untrusted code

`supervisor` is started as a program, outside the package; nothing here may import anything else of it.
"""
