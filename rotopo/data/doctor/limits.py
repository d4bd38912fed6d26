"""What the data doctor finds worth a warning, and how much it samples; all of it [ours]."""

# Rows that are read and tokenised again, of the training rows, and of those at max_length.
SAMPLE = 200
# Shares above which there is a warning: a few odd rows in a large set are nobody's mistake.
PROMPTS_CUT = 0.1
RESPONSES_CUT = 0.05
TOO_LONG = 0.1
BAD_ROWS = 0.01
DUPLICATES = 0.01
SHARED_PROMPTS = 0.01
SHORT_PROMPTS = 0.01
OTHER_SPLIT = 0.01
TEXT_LOST = 0.01
ODD_ROLES = 0.01
LITTLE_DIFFERENCE = 0.01
DIALOGUES = 0.01
# Of rows whose responses begin with the prompt: some answers begin with the question by themselves.
SOME_REPEAT = 0.05
MOST_REPEAT = 0.5
# A prompt of fewer words and letters says nothing there: responses may begin with a term that they
# explain. A name in front of it ("Question: ") has so many letters at most.
WORDS = 3
LETTERS = 20
NAME = 20
# A cut pair whose responses differ in no more tokens than this has little difference left; where
# such pairs are so large a share of all, it is an error.
FEW_TOKENS = 2
NO_DIFFERENCE = 0.5
# Warnings outside of these bands: the share of unpaired rows that are desirable, and the accuracy
# of "the longer response is the better one" (all of its 95 % interval).
DESIRABLE = (0.2, 0.8)
LONGER_IS_BETTER = (0.4, 0.6)
