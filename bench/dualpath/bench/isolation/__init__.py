"""`dualpath bench isolation`: the model's traffic on a link that KV transfers fill."""
