//! The control connection: messages between the two ends of a session, over as many connections in turn as it takes.
//!
//! A lost connection is made again by the source (a join); the destination waits for it. What was on its way when it
//! broke is gone: whoever sees [`Event::Up`] says again what the other may have missed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dwcp_link::{Reader, Writer};
use dwcp_proto::fault::Mechanism;
use dwcp_proto::limits::MAX_CONTROL;
use dwcp_proto::message::{Ack, Body, Ping, Purpose, Restarted, Switched};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc::error::SendError;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tracing::{debug, info};

use crate::counters::Counters;
use crate::error::Failure;
use crate::handshake::{Arrival, Dialler, Session};
use crate::wire::{Frame, WireError, read_frame, refusal_failure, write_message};

/// Between two signs of life asked of the peer.
const HEARTBEAT: Duration = Duration::from_millis(250);
/// After so long without a word from the peer its connection counts as dead.
const SILENCE: Duration = Duration::from_secs(4);
/// The same, if what was said to the peer meanwhile did not even reach its kernel.
const UNHEARD: Duration = Duration::from_secs(1);
/// From one attempt to connect to the next: data flows again well within a second of the link's return.
pub(crate) const RETRY: Duration = Duration::from_millis(200);
/// For so long nothing may come on a data connection, while the destination waits for just what was sent there, before it counts as
/// stalled. Beyond what TCP needs to send three times again what a lossy link of 300 ms lost.
pub(crate) const STALLED: Duration = Duration::from_secs(3);
/// Between two acknowledgements: each costs both ends a record of TLS, and a window of two milliseconds is small everywhere.
const ACK_PAUSE: Duration = Duration::from_millis(2);
/// The same, to a peer that refuses.
const RETRY_REFUSED: Duration = Duration::from_secs(3);
/// For the last words of a session to reach the peer, and for its own end to come.
const PARTING: Duration = Duration::from_secs(2);
/// Messages that may wait for the connection; more than a handover and a few refusals never come together.
const QUEUE: usize = 64;

/// What happens on the control connection.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a few at a time, and none lives long")]
pub(crate) enum Event {
    /// There is a connection.
    Up,
    /// There is none for now.
    Down(String),
    /// The peer said something.
    Message(Body),
    /// The peer refuses, or broke the protocol: there is no sense in going on, unless something was decided already.
    Lost(Failure),
}

/// What the peer says to the source's data path. It has a queue of its own: the migration's task may have to wait for a VMM
/// which itself waits until its data flows.
#[derive(Debug, Clone)]
pub(crate) enum DataEvent {
    Ack(Ack),
    /// Where the next leg begins.
    Switched(Switched),
    /// Why the destination wants no v3; empty if it may be.
    Veto(String),
    /// The control connection stands again; what was said may have been lost.
    Up,
    /// The destination's agent was restarted and knows no more of the leg than what its VMM was given.
    Restarted,
}

impl DataEvent {
    /// What a message says to the data path; the message again if that is not whom it is for.
    #[allow(clippy::result_large_err, reason = "no error: the message goes on to somebody else")]
    fn of(body: Body) -> Result<Self, Body> {
        match body {
            Body::Ack(ack) => Ok(DataEvent::Ack(ack)),
            Body::Switched(switched) => Ok(DataEvent::Switched(switched)),
            Body::Veto(veto) => Ok(DataEvent::Veto(veto.reason)),
            Body::Restarted(_) => Ok(DataEvent::Restarted),
            body => Err(body),
        }
    }
}

/// How to speak to the peer.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    out: mpsc::Sender<Body>,
}

/// Where the source's control connections come from.
pub(crate) enum Origin {
    /// We dial.
    Dial(Dialler),
    /// They arrive; with what an answer to a join says.
    Accept(mpsc::Receiver<Arrival>, watch::Receiver<Ack>),
}

/// This side's data path.
pub(crate) enum Data {
    /// It is told what the peer applied.
    Sends(mpsc::Sender<DataEvent>),
    /// It tells what it applied.
    Receives(watch::Receiver<Ack>),
}

impl Control {
    /// Starts serving the session's control connections, beginning with the one that opened it, if it stands. The task ends
    /// when `Control` and the events' receiver are dropped.
    pub(crate) fn start(
        session: Arc<Session>,
        first: Option<(Reader, Writer)>,
        origin: Origin,
        data: Data,
        counters: Arc<Counters>,
    ) -> (Control, mpsc::Receiver<Event>, impl Future<Output = ()> + Send) {
        let (out, messages) = mpsc::channel(QUEUE);
        let (events, receiver) = mpsc::channel(QUEUE);
        let (acks, data) = match data {
            Data::Sends(data) => (None, Some(data)),
            Data::Receives(acks) => (Some(acks), None),
        };
        let server = Server { session, messages, events, acks, data, counters, started: Instant::now() };
        (Control { out }, receiver, server.run(first, origin))
    }

    /// Says `body` as soon as there is a connection to say it on. Lost with the connection.
    pub(crate) async fn say(&self, body: Body) {
        // An error means that the session is over.
        let _ = self.out.send(body).await;
    }
}

struct Server {
    session: Arc<Session>,
    messages: mpsc::Receiver<Body>,
    events: mpsc::Sender<Event>,
    /// What to acknowledge; at the destination only.
    acks: Option<watch::Receiver<Ack>>,
    /// Who is acknowledged to; at the source only.
    data: Option<mpsc::Sender<DataEvent>>,
    counters: Arc<Counters>,
    started: Instant,
}

impl Server {
    async fn run(mut self, first: Option<(Reader, Writer)>, mut origin: Origin) {
        let mut halves = match first {
            Some(first) => first,
            None => match self.again(&mut origin).await {
                Some(halves) => halves,
                None => return,
            },
        };
        loop {
            if self.events.send(Event::Up).await.is_err() {
                return;
            }
            if let Some(data) = &self.data {
                // An ended data path has nothing to say again.
                let _ = data.send(DataEvent::Up).await;
            }
            let error = match self.serve(halves).await {
                Some(error) => error,
                None => return,
            };
            info!(%error, "control connection lost");
            let (text, transient) = (error.to_string(), error.is_transient());
            if !transient && self.events.send(Event::Lost(error.failure())).await.is_err() {
                return;
            }
            if self.events.send(Event::Down(text)).await.is_err() {
                return;
            }
            halves = match self.again(&mut origin).await {
                Some(halves) => halves,
                None => return,
            };
            self.counters.reconnects.add(1);
        }
    }

    /// The next connection; `None` once nobody waits for it any more.
    async fn again(&mut self, origin: &mut Origin) -> Option<(Reader, Writer)> {
        loop {
            let next = tokio::time::Instant::now() + RETRY;
            let Server { session, messages, events, .. } = self;
            let attempt = async {
                match origin {
                    Origin::Dial(dialler) => {
                        match dialler.join(session, &session.leg, Purpose::Control, 0).await {
                            Ok((reader, writer, ..)) => Ok(Some((reader, writer))),
                            Err(error) => Err(error),
                        }
                    }
                    Origin::Accept(arrivals, state) => match arrivals.recv().await {
                        Some(arrival) => {
                            let ack = state.borrow_and_update().clone();
                            arrival.accept(session, ack.next, ack.applied).await.map(Some)
                        }
                        None => Ok(None),
                    },
                }
            };
            tokio::pin!(attempt);
            let outcome = loop {
                tokio::select! {
                    outcome = &mut attempt => break outcome,
                    // What is said while nobody listens is lost; the queue must not fill.
                    message = messages.recv() => match message {
                        Some(body) => debug!(kind = body.kind(), "not said: no connection"),
                        None => return None,
                    },
                    () = events.closed() => return None,
                }
            };
            match outcome {
                Ok(halves) => return halves,
                Err(error) if error.is_transient() => {
                    debug!(%error, "control connection not made again yet");
                    sleep_until(next).await;
                }
                // Whoever decided already must not give up: the peer may come to know the session again.
                Err(error) => {
                    if events.send(Event::Lost(error.failure())).await.is_err() {
                        return None;
                    }
                    sleep(RETRY_REFUSED).await;
                }
            }
        }
    }

    fn elapsed_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Serves one connection until it fails; `None` once nobody needs it any more.
    async fn serve(&mut self, (mut reader, mut writer): (Reader, Writer)) -> Option<WireError> {
        let error = self.converse(&mut reader, &mut writer).await;
        if error.is_none() {
            // What is lost now the peer waits for in vain; but it may be gone itself.
            let _ = timeout(PARTING, self.part(reader, writer)).await;
        }
        error
    }

    /// Says what is still to be said and goodbye, and waits until the peer has heard it: a socket that is closed while something in it is
    /// unread is reset by the kernel, and what it had sent last may be lost at the peer.
    async fn part(&mut self, mut reader: Reader, mut writer: Writer) -> Result<(), WireError> {
        self.messages.close();
        while let Some(body) = self.messages.recv().await {
            write_message(&mut writer, body).await?;
        }
        writer.shutdown().await?;
        let mut unread = [0; 4096];
        while reader.read(&mut unread).await? > 0 {}
        Ok(())
    }

    async fn converse(&mut self, reader: &mut Reader, writer: &mut Writer) -> Option<WireError> {
        let (pongs, mut pings) = mpsc::channel::<Ping>(4);
        let gauge = reader.gauge();
        // In microseconds since the start.
        let heard = AtomicU64::new(self.elapsed_us());
        let data = self.data.as_ref();
        let read = read_all(reader, &self.events, data, pongs, self.started, &self.counters, &heard);
        tokio::pin!(read);
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Acknowledgements are state, not events: the newest is all the peer needs, and on a new connection it needs it.
        if let Some(acks) = &mut self.acks {
            acks.mark_changed();
        }
        let mut last_ack = Instant::now();
        loop {
            let body = tokio::select! {
                error = &mut read => return error,
                Some(ping) = pings.recv() => Body::Pong(ping),
                message = self.messages.recv() => match message {
                    Some(body) => body,
                    None => return None,
                },
                ack = next_ack(&mut self.acks, last_ack) => {
                    last_ack = Instant::now();
                    Body::Ack(ack)
                }
                _ = heartbeat.tick() => {
                    let silent = self.elapsed_us().saturating_sub(heard.load(Ordering::Relaxed));
                    let unheard = Duration::from_micros(silent) >= UNHEARD && gauge.backs_off();
                    if unheard && !Mechanism::GiveUp.is_off() {
                        return Some(WireError::Stalled);
                    }
                    Body::Ping(Ping { token: self.elapsed_us() })
                }
            };
            let write = write_message(writer, body);
            tokio::pin!(write);
            tokio::select! {
                wrote = &mut write => if let Err(error) = wrote {
                    // The reader may know better why.
                    return timeout(Duration::from_millis(100), &mut read).await.unwrap_or(Some(error));
                },
                error = &mut read => {
                    if error.is_none() {
                        // Others may follow it: never half a message.
                        let _ = timeout(PARTING, write).await;
                    }
                    return error;
                }
            }
        }
    }
}

/// The newest acknowledgement, once it has changed and the last one is a moment old.
async fn next_ack(acks: &mut Option<watch::Receiver<Ack>>, last: Instant) -> Ack {
    let Some(watched) = acks else { return std::future::pending().await };
    if watched.changed().await.is_err() {
        return std::future::pending().await;
    }
    watched.mark_changed();
    sleep_until((last + ACK_PAUSE).into()).await;
    watched.borrow_and_update().clone()
}

async fn read_all(
    reader: &mut Reader,
    events: &mpsc::Sender<Event>,
    data: Option<&mpsc::Sender<DataEvent>>,
    pongs: mpsc::Sender<Ping>,
    started: Instant,
    counters: &Counters,
    heard: &AtomicU64,
) -> Option<WireError> {
    let mut before = None;
    loop {
        let frame = match timeout(SILENCE, read_frame(reader, MAX_CONTROL)).await {
            Err(_) => return Some(WireError::Timeout(SILENCE)),
            Ok(Err(error)) => return Some(error),
            Ok(Ok(frame)) => frame,
        };
        heard.store(started.elapsed().as_micros() as u64, Ordering::Relaxed);
        let body = match frame {
            Frame::Message(body) => body,
            Frame::Chunk(_) => {
                return Some(WireError::Unexpected { got: "a chunk", expected: "a message" });
            }
        };
        let body = match data {
            None => body,
            Some(data) => match DataEvent::of(body) {
                Err(body) => body,
                Ok(said) => match data.send(said).await {
                    // After the data path's end a restart is the migration's own matter.
                    Err(SendError(DataEvent::Restarted)) => Body::Restarted(Restarted {}),
                    // Other late words are no matter.
                    _ => continue,
                },
            },
        };
        match body {
            // A full queue means a peer that asks faster than it reads; the newest question is answered later.
            Body::Ping(ping) => drop(pongs.try_send(ping)),
            Body::Pong(ping) => {
                let now = started.elapsed().as_micros() as u64;
                let rtt = now.saturating_sub(ping.token).max(1);
                // Of two: one may have waited behind something.
                counters.rtt_now_us.set(before.replace(rtt).map_or(rtt, |before| before.min(rtt)));
                let least = counters.rtt_us.load();
                if least == 0 || rtt < least {
                    counters.rtt_us.set(rtt);
                }
            }
            Body::Refused(refused) => return Some(WireError::Refused(refusal_failure(refused))),
            body => {
                if events.send(Event::Message(body)).await.is_err() {
                    return None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use dwcp_link::pipe;
    use dwcp_proto::message::{Choice, StreamEnd, Veto};
    use dwcp_proto::{Leg, NodeKey, NodeName, SessionId, Side};

    use super::*;
    use crate::handshake::Offers;
    use crate::wire::read_message;

    fn session() -> Arc<Session> {
        let key = |name, seed| NodeKey::from_seed(NodeName::new(name).unwrap(), &[seed; 32]);
        let id = SessionId([7; 32]);
        let choice = Choice { path: 1, streams: 1, ..Choice::default() };
        Arc::new(Session {
            id,
            side: Side::Source,
            key: Arc::new(key("a", 1)),
            peer: key("b", 2).public(),
            leg: Leg::first(id, choice).unwrap(),
            offers: Offers::default(),
        })
    }

    /// The peer speaks at the moment at which the session ends here: nothing that was said before is lost for that, and the connection
    /// stands until the peer has ended it.
    #[tokio::test]
    async fn the_last_words_are_heard_though_the_peer_speaks_at_that_moment() {
        // Which of the two is seen first is left to chance.
        for _ in 0..32 {
            let (here, there) = pipe(1 << 16);
            let (mut reader, mut writer) = there.into_split();
            let (_joins, arrivals) = mpsc::channel(1);
            let (_acks, acks) = watch::channel(Ack::default());
            let (control, mut events, server) = Control::start(
                session(),
                Some(here.into_split()),
                Origin::Accept(arrivals, acks.clone()),
                Data::Receives(acks),
                Arc::default(),
            );
            let server = tokio::spawn(server);
            assert!(matches!(events.recv().await, Some(Event::Up)));
            write_message(&mut writer, Body::Veto(Veto::default())).await.unwrap();
            for length in 1..=3 {
                control.out.try_send(Body::StreamEnd(StreamEnd { length, leg: 1 })).unwrap();
            }
            drop((control, events));

            let mut heard = 0;
            while let Ok((body, _)) = read_message(&mut reader).await {
                if let Body::StreamEnd(end) = body {
                    heard += 1;
                    assert_eq!(end.length, heard);
                }
            }
            assert_eq!(heard, 3);
            write_message(&mut writer, Body::Veto(Veto::default())).await.expect("it waits for our end");
            drop((reader, writer));
            server.await.unwrap();
        }
    }
}
