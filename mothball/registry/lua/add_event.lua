-- include: common
-- One lifecycle event from outside the scripts.
--
-- ARGV  1 kind   2... fields, name and value in turn
-- Returns the event's id
return redis.call('XADD', key('events'), 'MAXLEN', '~', EVENTS_MAX, '*', 'kind', arg(1), unpack(ARGV, 7))
