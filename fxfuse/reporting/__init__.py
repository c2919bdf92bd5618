"""What, why and how much: graphs, plans and results go in, a `Report`, its words and errors beyond tolerance come out.

Never imports `pipeline`, `compiling` or what stands above them, and changes nothing that it is shown.
"""
