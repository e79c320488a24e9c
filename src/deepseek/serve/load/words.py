"""Common English words: with the space before it, each is one token of most vocabularies, so that a
text of N of them has about N tokens for whichever server reads it."""

from __future__ import annotations

_TEXT = """\
about above across action after again against age ago air all almost along already also always among
amount animal another answer any anything area arm around art ask away baby back bad ball bank base
bed before begin behind being believe best better between big bill bird bit black blood blue board
boat body book both box boy break bring brother brown build building business but buy call camera
capital car care carry case cat cause center central certain chair chance change check child church
city class clear close cold color come common community company consider control cost could country
couple course court cover create cry cup current cut dark data day dead deal death decide deep
degree describe design develop die difference different difficult dinner direct direction discover
discuss do doctor dog door down draw dream dress drive drop dry during each early earth east easy
eat edge education effect effort eight either else end energy enjoy enough enter entire evening
event ever every evidence example experience explain eye face fact fall family far farm fast father
fear feel few field fight figure fill film final find fine finger finish fire first fish five floor
fly follow food foot force foreign forest forget form former forward four free friend front full
fund future game garden gas get girl give glass go goal good government great green ground group
grow growth gun guy hair half hand hang happen happy hard have head health hear heart heat heavy
help her here high hill history hit hold home hope horse hospital hot hotel hour house how human
hundred husband ice idea image imagine impact important improve include increase indeed industry
inside interest island issue item job join just keep key kid kill kind king kitchen know land
language large last late later laugh law lay lead leader learn least leave left leg less let letter
level lie life light like line list listen little live local long look lose loss lot love low
machine main major make man manage many map mark market matter maybe mean measure media medical meet
meeting member memory method middle might mile milk mind minute miss model modern moment money month
more morning most mother mountain mouth move movement movie much music must name nation natural
nature near nearly need network never new news next nice night nine none nor north note nothing
notice now number occur ocean off offer office officer often oil old once one only open order other
our out outside over own page pain paper parent part party pass past path pay peace people perhaps
period person phone pick picture piece place plan plant play player point police policy poor popular
position possible power present president press pretty price private problem process produce product
program project property protect prove provide public pull purpose push put quality question quickly
quite race radio rain raise range rate rather reach read ready real reality reason receive recent
record red reduce region remain remember remove report require research resource rest result return
rich right rise risk river road rock role room rule run safe same save say scene school science
score sea season seat second section security see seek seem sell send senior sense series serious
serve service set seven several share she ship shoot short shot should shoulder show side sign
simple since sing single sister sit six size skill skin small smile snow social soft soldier some
son song soon sort sound source south space speak special spend sport spring staff stage stand
standard star start state station stay step still stock stone stop store story street strong student
study stuff style subject success such sudden suffer suggest summer sun support sure surface system
table take talk task teach teacher team tell ten tend term test than thank that the their them then
theory there these they thing think third this those though thought thousand threat three through
throw time today together tonight too top total tough toward town trade train travel treat tree
trial trip trouble true trust truth try turn two type under unit until up upon use usual value very
view visit voice vote wait walk wall want war watch water way wear week weight well west what when
where which while white who whole why wide wife will win wind window wish with within without woman
wonder wood word work worker world worry would write writer wrong yard yeah year yellow yes yet
young
"""

WORDS: tuple[str, ...] = tuple(_TEXT.split())
"""Sorted, each once."""
