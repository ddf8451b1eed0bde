"""Tests of one module each; the folders mirror the floors."""
