//! Watches several QEMUs' run states all along, by polling and by their own events.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow, bail};

use crate::qemu::Qemu;
use crate::qmp::{Event, Qmp};

/// Pause between two rounds of asking. The events fill in what happens within it.
const PERIOD: Duration = Duration::from_millis(5);

/// Something that a VM was seen to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// Microseconds since the epoch: QEMU's own stamp for events, the watcher's for run states.
    pub micros: u64,
    /// Which VM: its place in the list given to [`Watcher::start`].
    pub vm: usize,
    /// An event's name, such as `STOP`, or a run state that was new, such as `postmigrate`. A VM that died is `gone`.
    pub what: String,
}

/// All that was seen, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    /// The moments in the order of their stamps.
    pub moments: Vec<Moment>,
}

impl Timeline {
    /// Time from the last `STOP` of `from` to the first `RESUME` of `to` after it, by QEMU's own stamps.
    ///
    /// # Errors
    /// One of the two was not seen.
    pub fn downtime(&self, from: usize, to: usize) -> Result<Duration> {
        let seen =
            |vm, what| self.moments.iter().filter(move |moment| moment.vm == vm && moment.what == what);
        let stop = seen(from, "STOP").next_back().ok_or_else(|| anyhow!("no STOP seen:\n{self}"))?;
        let resume = seen(to, "RESUME")
            .find(|moment| moment.micros >= stop.micros)
            .ok_or_else(|| anyhow!("no RESUME after the STOP:\n{self}"))?;
        Ok(Duration::from_micros(resume.micros - stop.micros))
    }

    /// The moment at which a second VM started while another ran, by the events; `running` are those at the beginning.
    fn overlap(&self, mut running: Vec<bool>) -> Option<&Moment> {
        self.moments.iter().find(|moment| {
            match moment.what.as_str() {
                "STOP" | "gone" => running[moment.vm] = false,
                "RESUME" => running[moment.vm] = true,
                _ => {}
            }
            running.iter().filter(|&&runs| runs).count() > 1
        })
    }
}

impl std::fmt::Display for Timeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let start = self.moments.first().map_or(0, |moment| moment.micros);
        for Moment { micros, vm, what } in &self.moments {
            writeln!(f, "{:>10.3} ms  VM {vm}  {what}", (micros - start) as f64 / 1e3)?;
        }
        Ok(())
    }
}

/// A thread that watches until [`Watcher::finish`].
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Sampler>>,
}

impl Watcher {
    /// Begins to watch these VMs; none may be running beside another from here on.
    ///
    /// # Errors
    /// One of them does not answer.
    pub fn start(vms: &[&Qemu]) -> Result<Self> {
        let sampler = Sampler::new(vms.iter().map(|vm| vm.shared_watch()).collect())?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || sampler.run(&stop)
        });
        Ok(Watcher { stop, thread: Some(thread) })
    }

    /// Ends the watch and gives what was seen.
    ///
    /// # Errors
    /// Two of the VMs ran at the same time.
    pub fn finish(mut self) -> Result<Timeline> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow!("the watch has ended"))?;
        let mut sampler = thread.join().map_err(|_| anyhow!("the watch panicked"))?;
        sampler.timeline.moments.sort_by_key(|moment| moment.micros);
        let by_event = sampler.timeline.overlap(sampler.running_first);
        if let Some(moment) = by_event.or(sampler.two_running.as_ref()) {
            bail!("two guests ran at once at {} (VM {}):\n{}", moment.micros, moment.vm, sampler.timeline);
        }
        Ok(sampler.timeline)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The watching thread's own state.
struct Sampler {
    vms: Vec<Arc<Mutex<Qmp>>>,
    states: Vec<String>,
    running_first: Vec<bool>,
    two_running: Option<Moment>,
    timeline: Timeline,
}

impl Sampler {
    fn new(vms: Vec<Arc<Mutex<Qmp>>>) -> Result<Self> {
        let mut states = Vec::new();
        for vm in &vms {
            let mut vm = vm.lock().unwrap_or_else(PoisonError::into_inner);
            states.push(vm.status()?);
            // What happened before the watch is of no interest.
            vm.events().for_each(drop);
        }
        let running_first = states.iter().map(|state| state == "running").collect();
        Ok(Sampler { vms, states, running_first, two_running: None, timeline: Timeline::default() })
    }

    fn run(mut self, stop: &AtomicBool) -> Self {
        // One more round after the word to stop, so that nothing before it is missed.
        for last in [false, true] {
            while last || !stop.load(Ordering::Relaxed) {
                self.round();
                if last {
                    break;
                }
                std::thread::sleep(PERIOD);
            }
        }
        self
    }

    /// Asks each VM once. Two ran at once if one did before and after the other was seen to.
    fn round(&mut self) {
        for vm in 0..self.vms.len() {
            if self.states[vm] == "gone" {
                continue;
            }
            let (state, events) = self.ask(vm);
            let runs = state == "running";
            if let Some(between) = (0..self.vms.len()).find(|&other| {
                other != vm && runs && self.states[vm] == "running" && self.states[other] == "running"
            }) {
                let what = "running".to_owned();
                self.two_running.get_or_insert(Moment { micros: now_micros(), vm: between, what });
            }
            self.timeline.moments.extend(events.into_iter().map(|event| Moment {
                micros: event.micros,
                vm,
                what: event.name,
            }));
            if self.states[vm] != state {
                self.states[vm].clone_from(&state);
                self.timeline.moments.push(Moment { micros: now_micros(), vm, what: state });
            }
        }
    }

    fn ask(&self, vm: usize) -> (String, Vec<Event>) {
        let mut qmp = self.vms[vm].lock().unwrap_or_else(PoisonError::into_inner);
        let state = qmp.status().unwrap_or_else(|_| "gone".to_owned());
        (state, qmp.events().collect())
    }
}

fn now_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(moments: &[(u64, usize, &str)]) -> Timeline {
        let moment = |&(micros, vm, what): &(u64, usize, &str)| Moment { micros, vm, what: what.to_owned() };
        Timeline { moments: moments.iter().map(moment).collect() }
    }

    #[test]
    fn downtime_is_from_stop_to_resume() {
        let seen = timeline(&[(5, 0, "STOP"), (6, 0, "RESUME"), (10, 0, "STOP"), (14, 1, "RESUME")]);
        assert_eq!(seen.downtime(0, 1).unwrap(), Duration::from_micros(4));
        assert!(seen.downtime(1, 0).is_err());
    }

    #[test]
    fn an_overlap_of_a_microsecond_is_found() {
        let clean = timeline(&[(5, 0, "STOP"), (6, 1, "RESUME"), (7, 1, "STOP"), (8, 0, "RESUME")]);
        assert_eq!(clean.overlap(vec![true, false]), None);
        let both = timeline(&[(5, 1, "RESUME"), (6, 0, "STOP")]);
        assert_eq!(both.overlap(vec![true, false]).map(|moment| moment.micros), Some(5));
    }
}
