//! The codec threads, shared by all migrations of the node.
//!
//! Hashing, compressing and decompressing would block the network's tasks; they run here, on plain threads. Results
//! come back through one-shot channels, so each caller gets them in the order in which it waits for them.

use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use dwcp_hde::{Decoder, Encoder};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// What a worker keeps from job to job: codec contexts and scratch buffers.
pub(crate) struct Worker {
    /// For sending.
    pub(crate) encoder: Encoder,
    /// For receiving.
    pub(crate) decoder: Decoder,
}

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// Jobs of one migration beyond one for each worker: the one that is ready when a worker becomes free.
const SPARE_JOBS: usize = 1;

/// The pool. Its threads end when the last handle is dropped.
#[derive(Clone)]
pub(crate) struct Pool {
    jobs: Sender<Job>,
    workers: usize,
}

impl Pool {
    /// Starts `workers` threads, at least one, for at most `migrations` migrations at once.
    pub(crate) fn new(workers: usize, migrations: usize) -> std::io::Result<Self> {
        let workers = workers.max(1);
        // Every migration's share fits, so that submitting never blocks.
        let (jobs, queue) = bounded::<Job>((workers + SPARE_JOBS) * migrations.max(1));
        for n in 0..workers {
            let queue: Receiver<Job> = queue.clone();
            thread::Builder::new().name(format!("codec-{n}")).spawn(move || {
                let mut worker = Worker { encoder: Encoder::new(), decoder: Decoder::new() };
                for job in queue {
                    job(&mut worker);
                }
            })?;
        }
        Ok(Pool { jobs, workers })
    }

    /// One migration's share of the pool.
    pub(crate) fn share(&self) -> Share {
        Share { pool: self.clone(), permits: Arc::new(Semaphore::new(self.workers + SPARE_JOBS)) }
    }
}

/// See [`Pool::share`].
#[derive(Clone)]
pub(crate) struct Share {
    pool: Pool,
    permits: Arc<Semaphore>,
}

impl Share {
    /// Runs `work` on a worker as soon as this share has a free place; the receiver gets its result, or an error if the
    /// work panicked or the pool is gone.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (reply, result) = oneshot::channel();
        let Ok(permit) = self.permits.clone().acquire_owned().await else { return result };
        let job: Job = Box::new(move |worker: &mut Worker| {
            // A panic must cost this migration, not a worker of all of them.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(worker)));
            match outcome {
                Ok(value) => drop(reply.send(value)),
                Err(_) => *worker = Worker { encoder: Encoder::new(), decoder: Decoder::new() },
            }
            drop::<OwnedSemaphorePermit>(permit);
        });
        match self.pool.jobs.try_send(job) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            // More migrations than the queue was made for: dropping the job drops its reply, which is an error.
            Err(TrySendError::Full(_)) => tracing::error!("the codec pool's queue is full"),
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn results_come_back_and_a_panic_costs_only_its_own() {
        let pool = Pool::new(1, 1).unwrap();
        let share = pool.share();
        let bad = share.run(|_| -> u32 { panic!("on purpose") }).await;
        let good = share.run(|_| 7).await;
        assert!(bad.await.is_err());
        assert_eq!(good.await, Ok(7));
    }
}
