//! Turns at work of which only so much may be under way at once.
//!
//! Who waits is served in the order of arrival, for as long as nobody waits long. Once the oldest has waited for longer than
//! the patience the newest goes first: in a flood the oldest are about to give up, and what is done for them is lost, so that
//! a strict order would serve nobody.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

/// The turns of one kind of work.
#[derive(Debug)]
pub(crate) struct Turns {
    patience: Duration,
    line: Mutex<Line>,
}

#[derive(Debug)]
struct Line {
    free: usize,
    /// Oldest first. One whose receiver is gone has given up.
    waiting: VecDeque<(Instant, oneshot::Sender<Turn>)>,
}

/// A turn; it is over when this is dropped. Empty once it has been passed on.
#[derive(Debug)]
pub(crate) struct Turn(Option<Arc<Turns>>);

impl Turns {
    /// So many at once.
    pub(crate) fn new(count: usize, patience: Duration) -> Arc<Self> {
        let line = Mutex::new(Line { free: count, waiting: VecDeque::new() });
        Arc::new(Turns { patience, line })
    }

    /// Waits for a turn; to drop the future is to give up.
    pub(crate) async fn take(self: &Arc<Self>) -> Turn {
        let turn = {
            let mut line = self.line();
            if line.free > 0 {
                line.free -= 1;
                return Turn(Some(Arc::clone(self)));
            }
            let (pass, turn) = oneshot::channel();
            line.waiting.push_back((Instant::now(), pass));
            turn
        };
        match turn.await {
            Ok(turn) => turn,
            // Senders leave the line only with a turn, or when their receiver is gone.
            Err(_) => std::future::pending().await,
        }
    }

    /// Whoever is next; if there is none the turn is free.
    fn next(&self) -> Option<oneshot::Sender<Turn>> {
        let mut line = self.line();
        let gone = |(_, pass): &(Instant, oneshot::Sender<Turn>)| pass.is_closed();
        while line.waiting.front().is_some_and(gone) {
            line.waiting.pop_front();
        }
        let late = line.waiting.front().is_some_and(|(since, _)| since.elapsed() > self.patience);
        let next = if late { line.waiting.pop_back() } else { line.waiting.pop_front() };
        line.free += usize::from(next.is_none());
        next.map(|(_, pass)| pass)
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(turns) = self.0.take() else { return };
        while let Some(pass) = turns.next() {
            match pass.send(Turn(Some(Arc::clone(&turns)))) {
                Ok(()) => return,
                // It gave up just now, and the turn goes to somebody else, in this loop.
                Err(mut turn) => turn.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(500);

    /// Who waits, in the order of arrival, each `gap` after the one before; they write down their number when it is their turn.
    async fn wait(
        turns: &Arc<Turns>,
        count: usize,
        gap: Duration,
    ) -> (Vec<tokio::task::JoinHandle<()>>, Arc<Mutex<Vec<usize>>>) {
        let served = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for number in 0..count {
            let (turns, served) = (Arc::clone(turns), Arc::clone(&served));
            tasks.push(tokio::spawn(async move {
                let _turn = turns.take().await;
                served.lock().unwrap().push(number);
            }));
            tokio::task::yield_now().await;
            tokio::time::advance(gap).await;
        }
        (tasks, served)
    }

    async fn served(tasks: Vec<tokio::task::JoinHandle<()>>, served: &Mutex<Vec<usize>>) -> Vec<usize> {
        for task in tasks {
            let _ = task.await;
        }
        served.lock().unwrap().clone()
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_comes_first() {
        let turns = Turns::new(1, PATIENCE);
        let busy = turns.take().await;
        let (tasks, order) = wait(&turns, 4, PATIENCE / 8).await;
        assert!(order.lock().unwrap().is_empty());
        drop(busy);
        assert_eq!(served(tasks, &order).await, [0, 1, 2, 3]);
        assert_eq!(turns.line().free, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn in_a_flood_the_newest_comes_first() {
        let turns = Turns::new(1, PATIENCE);
        let busy = turns.take().await;
        let (tasks, order) = wait(&turns, 4, PATIENCE / 2).await;
        drop(busy);
        // The two newest; by then the oldest of all still waits beyond its patience, and goes last.
        assert_eq!(served(tasks, &order).await, [3, 2, 1, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_gave_up_takes_no_turn() {
        let turns = Turns::new(2, PATIENCE);
        let busy = (turns.take().await, turns.take().await);
        let (tasks, order) = wait(&turns, 5, Duration::ZERO).await;
        for number in [0, 2, 4] {
            tasks[number].abort();
        }
        tokio::task::yield_now().await;
        drop(busy);
        assert_eq!(served(tasks, &order).await, [1, 3]);
        let line = turns.line();
        assert_eq!((line.free, line.waiting.len()), (2, 0));
    }
}
