"""The health report: what is measured on posteriors and decoder, what it means, the page."""
