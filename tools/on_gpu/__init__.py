"""What tools/gpu runs; see __main__.py.

A part is a module with two functions: ``cases(place)``, its cases by name in the order of their
value, and ``line(ended)``, what those that have ended come to, in one line. The part runs in a
process of its own (part.py), which writes down each case (journal.py); the process that started it
(runner.py) stops it at its time limit, starts it again behind a case that it died of, and prints.
"""
