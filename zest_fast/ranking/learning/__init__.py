"""From records of sweeps to a Ranker: what layers were worth, the rows that are fitted, the fit and its tests. Only who
fits comes here."""
