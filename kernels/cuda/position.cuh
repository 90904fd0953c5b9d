// Where the position of a launch's first token comes from.
#pragma once
#include "common.cuh"

// Word 1 of the step words (of a step that `begin_step` began), so that one
// graph serves many tokens, but between 0 and `first`, the last position that
// the launch has memory for; without step words `first` itself.
DEVICE int first_position_of(const int* step, int first) {
    return step ? max(min(step[1], first), 0) : first;
}
