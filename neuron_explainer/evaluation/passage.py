"""A text to measure on if the user gives none. It was written for this purpose."""

PASSAGE = """\
The ferry left a little after six, when the fog had thinned enough for the captain to see the \
first buoy. There were nine passengers: a schoolteacher with a box of seedlings on her knees, two \
brothers who had not spoken since Tuesday, a man selling clocks, and a family of five who had \
been told that the island was warm in spring. It was not warm. The children counted gulls until \
the gulls became too many, and then they counted the teacher's seedlings, which were beans, and \
of which there were forty-one.

"You could sell one," said the youngest, "and have forty."

"I could," she said, "but then I would have to choose which, and they have only just got used to \
each other."

Nobody knows exactly who built the lighthouse. The records burned in 1887, and what people \
remember is what they were told by people who remembered something else. The stone is not local. \
It must have come by water, in barges, from the quarries to the north, at a cost that the harbour \
committee would today call irresponsible. The lamp, on the other hand, is well documented: it was \
ordered from a workshop in the capital, delivered late, and paid for later still.

To repair a wooden clock, begin by doing nothing. Listen to it for an hour. If it ticks unevenly, \
the case is probably not level, and a folded piece of paper under one corner will do more than \
any tool. If it does not tick at all, open the back, and look for dust, a slipped cord, or a \
spider. Only when you are sure that none of these is the cause should you touch the wheels; and \
before you do, make a drawing, because what comes apart in a minute may take an evening to put \
together again.

The committee met on the second Monday of the month. Present were the chair, the treasurer, and \
six of the ten members; apologies were received from three. The minutes of the last meeting were \
read and, after a discussion about a comma, approved. The treasurer reported that income had \
risen by four per cent, that costs had risen by seven, and that the difference could not be \
explained by the comma. It was agreed to repaint the benches, to ask again about the lamp, and to \
thank the teacher for the beans.

When the brothers reached the top of the hill, the elder sat down on a stone and said that he was \
sorry, although he did not say for what, and the younger said that it did not matter, although it \
did. Below them the ferry was turning for home. They watched it grow smaller. "Do you remember," \
said the younger, "the winter when the harbour froze, and father walked out with a rope around \
his waist, and all of us held the other end?" And the elder, who remembered it differently, said \
that he did.
"""
