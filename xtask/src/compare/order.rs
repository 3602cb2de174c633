//! The order in which contenders take their turns.

/// Every other round goes backwards, and each pair of rounds begins with another contender, so that nobody always comes after the
/// same one.
pub(crate) fn order(count: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).map(|index| (index + round / 2) % count.max(1)).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_turns_round_and_leaves_nobody_out() {
        assert_eq!(order(3, 0), [0, 1, 2]);
        assert_eq!(order(3, 1), [2, 1, 0]);
        assert_eq!(order(3, 2), [1, 2, 0]);
        for round in 0..8 {
            let mut sorted = order(7, round);
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6]);
        }
    }
}
