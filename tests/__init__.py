"""Tests of matchai."""
